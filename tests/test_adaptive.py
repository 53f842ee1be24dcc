"""An adaptive run draws what its rule says from what was measured, and can be told and repeated afterwards."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from curriculum import adaptive, order, score
from curriculum.adaptive import Rule, Streams, drawn_shares, learned, rewards
from curriculum.compare import ORDER, SELECTION
from curriculum.loader import open_stream
from curriculum.records import as_compared, find_runs, usable_arms
from data.cli import InputError
from scripts import controls
from tests.test_train_gpt import ALONE, ONE, ROOT, command, rows_of, same_weights, tiny_config

RULE = Rule(eta=0.5, share=0.1, floor=0.25)
BINS = 4


# -- The rule


@given(
    nats=st.lists(st.lists(st.floats(0.1, 12), min_size=3, max_size=3), min_size=2, max_size=12),
    eta=st.floats(0, 100),
    share=st.floats(0, 1),
    floor=st.floats(0.01, 1),
    closed=st.integers(0, 3),
)
def test_every_bin_keeps_its_floor_and_weights_sum_to_one(nats, eta, share, floor, closed):
    rule, mass_S = Rule(eta, share, floor), np.array([0.2, 0.3, 0.5])
    weight_S = mass_S
    for before, after in zip(nats, nats[1:], strict=False):
        reward_S = rewards(before, after, mass_S)
        assert np.abs(reward_S).max() <= 1
        weight_S = learned(weight_S, reward_S, mass_S, rule)
        assert weight_S.sum() == pytest.approx(1)
        drawn_S = drawn_shares(weight_S, np.arange(3) != closed, mass_S, rule)
        assert drawn_S.sum() == pytest.approx(1)
        assert np.all((drawn_S >= floor * mass_S * (1 - 1e-12)) == (np.arange(3) != closed))


def test_a_reward_is_the_lead_of_a_bins_progress_over_the_pools_mean():
    mass_S = np.array([0.5, 0.25, 0.25])
    before, after = [4.0, 3.0, 2.0], [3.0, 2.8, 2.2]  # drops 1, 0.2, -0.2; the mean is 0.5
    assert rewards(before, after, mass_S).tolist() == pytest.approx([0.5 / 0.7, -0.3 / 0.7, -1.0])
    assert rewards(before, [x - 0.3 for x in before], mass_S).tolist() == [0, 0, 0]
    noise = [x + 1e-13 for x in after]  # as another number of processes adds up
    assert rewards(before, noise, mass_S).tolist() == rewards(before, after, mass_S).tolist()


def simulated(drop, decisions: int, rule: Rule = RULE) -> np.ndarray:
    """What is drawn at every decision if bin b's loss falls by drop(i, b): (decisions, S)."""
    mass_S = np.full(BINS, 1 / BINS)
    weight_S, nats, drawn = mass_S, np.full(BINS, 9.0), []
    for i in range(decisions):
        later = nats - [drop(i, b) for b in range(BINS)]
        weight_S = learned(weight_S, rewards(nats, later, mass_S), mass_S, rule)
        drawn.append(drawn_shares(weight_S, np.ones(BINS, bool), mass_S, rule))
        nats = later
    return np.array(drawn)


def test_a_bin_that_is_steadily_ahead_gains_weight_and_loses_it_when_it_falls_behind():
    drawn_DS = simulated(lambda i, b: 0.02 if b == (1 if i < 15 else 3) else 0.01, 30)
    assert np.all(np.diff(drawn_DS[:12, 1]) > 0) and drawn_DS[14, 1] > 2 / BINS
    assert drawn_DS[29, 3] > 2 / BINS and drawn_DS[29, 1] < 1 / BINS
    assert simulated(lambda i, b: 0.01, 5) == pytest.approx(1 / BINS)
    assert simulated(lambda i, b: 0.01 * b, 9, Rule(100, 0, 0.25)).min() == pytest.approx(0.25 / BINS)


def test_noise_alone_moves_weights_little_and_to_no_side():
    rng = np.random.default_rng(0)
    drawn_DS = simulated(lambda i, b: rng.normal(), 2000)
    assert drawn_DS.mean(0) == pytest.approx(1 / BINS, abs=0.05)


# -- Drawing


def random_streams(seed: int, num: int = 100) -> tuple[Streams, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    length_N, bin_N = rng.integers(1, 65, num), rng.permutation(np.arange(num) % BINS)
    return Streams(np.arange(num), bin_N, length_N), bin_N, length_N


@given(seed=st.integers(0, 10**6), stretch=st.integers(1, 700))
@settings(max_examples=20)
def test_drawn_to_the_end_every_segment_comes_once_and_every_stretch_is_full(seed, stretch):
    streams, bin_N, length_N = random_streams(seed)
    rng, drawn, tokens = np.random.default_rng(seed), [], 0
    while missing := min(stretch, int(length_N.sum()) - tokens):
        share_S = drawn_shares(rng.dirichlet(np.ones(BINS)), streams.open_S, np.full(BINS, 1 / BINS), RULE)
        ids = streams.take(share_S, missing, rng)
        assert length_N[ids].sum() - length_N[ids[-1]] < missing <= length_N[ids].sum()
        drawn, tokens = [*drawn, *ids], tokens + int(length_N[ids].sum())
        assert abs(streams.owed_S.sum()) < 1e-6
    assert sorted(drawn) == list(range(100))
    for b in range(BINS):  # within a bin the sequence is that of its stream
        assert [i for i in drawn if bin_N[i] == b] == np.flatnonzero(bin_N == b).tolist()


@pytest.mark.parametrize("stretch", [10, 64, 500, 2000])
def test_a_bin_has_what_its_weights_asked_for_within_a_segment(stretch):
    """However short the stretches: nothing that is owed is forgotten."""
    streams, bin_N, length_N = random_streams(1, num=2000)
    rng, asked_S, given_S = np.random.default_rng(0), np.zeros(BINS), np.zeros(BINS)
    while given_S.sum() < 20_000:
        share_S = drawn_shares(rng.dirichlet(np.ones(BINS) / 4), streams.open_S, np.full(BINS, 1 / BINS), RULE)
        ids = streams.take(share_S, stretch, rng)
        asked_S += share_S * length_N[ids].sum()
        given_S += np.bincount(bin_N[ids], weights=length_N[ids], minlength=BINS)
        assert np.abs(asked_S - given_S).max() <= 1.5 * 64
        assert streams.owed_S == pytest.approx(asked_S - given_S)


def test_chance_decides_what_falls_due_at_the_same_moment():
    """Segments of one length at even shares: a round of all bins after the other, each in a sequence of its own."""
    streams = Streams(np.arange(40), np.arange(40) % BINS, np.full(40, 16))
    rounds = streams.take(np.full(BINS, 1 / BINS), 640, np.random.default_rng(0)).reshape(-1, BINS) % BINS
    assert np.array_equal(np.sort(rounds), np.tile(np.arange(BINS), (10, 1)))
    assert len({tuple(one) for one in rounds}) > 3


# -- Runs


@pytest.fixture(scope="module")
def made(tiny_corpus, tmp_path_factory):
    """Scores of the tiny corpus, and adaptive orders of it."""
    folder = tmp_path_factory.mktemp("adaptive")
    score.main(str(tiny_corpus), "none", folder / "scores", max_len=64)
    for name, text in dict(adaptive="adaptive(progress, eta=1)", placebo="placebo(adaptive(eta=1))").items():
        order.main(folder / "scores", folder / f"{name}.npy", measure="unigram_nll", schedule=text, bins=BINS, seed=3)
    return tiny_corpus, folder


def config(made, out, order: str = "adaptive.npy", data: dict | None = None, **run):
    cfg = tiny_config(made[0], out, **run)
    tables = dict(order=str(made[1] / order), val_every=3, val_every_late=1) | (data or {})
    return cfg.model_copy(update=dict(data=cfg.data.model_copy(update=tables)))


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """A run over the whole pool."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert train_gpt.train(config(made, out), ONE)
    return out


@pytest.fixture(scope="module")
def short(made, tmp_path_factory):
    """A run over half of it."""
    out = tmp_path_factory.mktemp("run") / "short"
    assert train_gpt.train(config(made, out, steps=12), ONE)
    return out


def drawn_ids(out) -> np.ndarray:
    steps = [row["step"] for row in rows_of(out) if "drawn_sha256" in row]
    return np.concatenate([np.load(adaptive.drawn_path(out, step)) for step in steps])


def test_the_order_file_is_the_pool_interleaved_evenly(made):
    loaded = order.load_order(made[1] / "adaptive.npy")
    assert loaded.manifest["schedule"] == "adaptive(reward=progress, eta=1.0, share=0.1, floor=0.25)"
    order.main(made[1] / "scores", made[1] / "even.npy", "unigram_nll", "stratified", BINS, seed=3)
    assert np.array_equal(loaded.ids_N, order.load_order(made[1] / "even.npy").ids_N)


def test_other_readers_and_controls_know_what_a_pool_is(made, tmp_path, capsys):
    corpus, folder = made
    with pytest.raises(InputError, match="adaptive: train_gpt.py draws from it as it goes"):
        open_stream(corpus, folder / "adaptive.npy")
    controls.main(folder / "adaptive.npy", only=("reverse", "random"), out=tmp_path)
    assert "has no reverse" in capsys.readouterr().out and (tmp_path / "adaptive-random.npy").exists()


def test_what_was_decided_follows_from_what_was_measured(made, short):
    """Rows of the log, from one to the next, by the rule; and the stretches they speak of."""
    rows = rows_of(short)
    decided = [row for row in rows if "bin_weights" in row]
    measured = {row["step"]: row["bin_nats"] for row in rows if "bin_nats" in row}
    assert [row["step"] for row in decided] == [0, *sorted(measured)][:-1] == [0, 3, 6, 9, 11]
    manifest = order.load_order(made[1] / "adaptive.npy").manifest
    mass_S = np.array(manifest["bin_tokens"]) / sum(manifest["bin_tokens"])
    weight_S = mass_S
    for before, now in zip([None, None, *decided[1:]], decided, strict=False):
        if before is None:
            assert "bin_rewards" not in now
        else:
            reward_S = rewards(measured[before["step"]], measured[now["step"]], mass_S)
            weight_S = learned(weight_S, reward_S, mass_S, Rule(1.0, 0.1, 0.25))
            assert now["bin_rewards"] == pytest.approx(reward_S.tolist())
        assert now["bin_weights"] == pytest.approx(
            drawn_shares(weight_S, np.ones(BINS, bool), mass_S, Rule(1.0, 0.1, 0.25))
        )
    assert decided[-1]["bin_weights"] != pytest.approx(mass_S, abs=0.02)
    work = train_gpt.prepare(config(made, short, steps=12), lambda _: None)
    drawn = np.cumsum(work.train.segments.length_N[drawn_ids(short)])
    ends = np.cumsum([row["drawn_segments"] for row in decided])
    for row, after in zip(ends, work.plan.begin_S[[3, 6, 9, 11, 12]], strict=True):  # and nothing ahead of a decision
        assert drawn[row - 2] < after <= drawn[row - 1]


def test_over_the_whole_pool_every_segment_is_used_once(made, whole):
    ids = drawn_ids(whole)
    assert np.array_equal(np.sort(ids), np.sort(order.load_order(made[1] / "adaptive.npy").ids_N))
    assert not np.array_equal(ids, order.load_order(made[1] / "adaptive.npy").ids_N)
    about = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])["order"]
    assert about["multiset_sha256"] == order.load_order(made[1] / "adaptive.npy").manifest["multiset_sha256"]


@pytest.mark.parametrize("which", ["whole", "short"])
def test_the_replay_is_a_static_order_with_the_same_losses(made, which, request, tmp_path, capsys):
    out = request.getfixturevalue(which)
    adaptive.main(out, out=made[1] / f"replay-{which}.npy")
    manifest = order.load_order(made[1] / f"replay-{which}.npy").manifest
    assert (
        "adaptive" not in manifest
        and manifest["recipe"] != order.load_order(made[1] / "adaptive.npy").manifest["recipe"]
    )
    assert manifest["multiset"] == dict(whole="exact", short="reweight")[which]
    assert manifest["largest_deviation_tokens"] < (200 if which == "short" else np.inf)
    cfg = config(made, tmp_path / "replay", f"replay-{which}.npy", steps=12 if which == "short" else 0)
    train_gpt.train(cfg, ONE)
    kept = [row for row in rows_of(out) if "bin_weights" not in row]
    assert rows_of(tmp_path / "replay") == kept
    assert same_weights(tmp_path / "replay", out)


def test_stopping_after_every_step_equals_never_stopping(made, short, tmp_path):
    stops = 0
    while not train_gpt.train(config(made, tmp_path / "broken", steps=12, max_seconds=1e-9), ONE):
        stops += 1
    assert stops == 11
    assert rows_of(tmp_path / "broken") == rows_of(short)
    assert np.array_equal(drawn_ids(tmp_path / "broken"), drawn_ids(short))
    assert same_weights(tmp_path / "broken", short)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_decision_changes_nothing(made, short, tmp_path, monkeypatch, when):
    """Before it is written down and after, with resume points from some steps earlier: what was drawn ahead is drawn
    again."""
    decide, out = adaptive.Course.decide, tmp_path / "crashed"

    class Crash(Exception):
        pass

    for step in (0, 3, 9):

        def crashing(course, at, bin_nats, again=False, step=step):
            if when == "before" and at == step and not again:
                raise Crash
            told = decide(course, at, bin_nats, again)
            if at == step and not again:
                raise Crash
            return told

        monkeypatch.setattr(adaptive.Course, "decide", crashing)
        with pytest.raises(Crash):
            train_gpt.train(config(made, out, steps=12, checkpoint_seconds=1e-9), ONE)
    monkeypatch.setattr(adaptive.Course, "decide", decide)
    train_gpt.train(config(made, out, steps=12), ONE)
    assert rows_of(out) == rows_of(short)
    assert same_weights(out, short)


def test_two_processes_that_are_killed_and_one_that_goes_on_draw_what_one_does(made, short, tmp_path):
    shared = tmp_path / "shared"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        where = dict(MASTER_ADDR="localhost", MASTER_PORT=str(probe.getsockname()[1]), WORLD_SIZE="2")
    where["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # the number changes the last bits
    line = command(config(made, shared, steps=12), tmp_path)
    environments = [ALONE | where | {"RANK": str(rank)} for rank in range(2)]
    processes = [subprocess.Popen(line, cwd=ROOT, env=env, stdout=-3, stderr=-3) for env in environments]
    metrics = shared / "metrics.jsonl"
    while processes[0].poll() is None and (not metrics.exists() or "bin_rewards" not in metrics.read_text()):
        time.sleep(0.002)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [process.wait() for process in processes][0] == -signal.SIGKILL, "ended before it could be killed"
    assert rows_of(shared)[-1]["step"] < 12
    train_gpt.train(config(made, shared, steps=12), ONE)
    assert np.array_equal(drawn_ids(shared), drawn_ids(short))
    assert same_weights(shared, short)


def test_a_placebo_draws_by_the_same_rule_from_bins_dealt_by_chance(made, tmp_path):
    train_gpt.train(config(made, tmp_path / "placebo", "placebo.npy", steps=12), ONE)
    weights = [row["bin_weights"] for row in rows_of(tmp_path / "placebo") if "bin_weights" in row]
    assert len(weights) == 5 and weights[-1] != weights[0]
    bins = [np.load(order.bins_path(made[1] / f"{name}.npy")) for name in ("adaptive", "placebo")]
    ids = [order.load_order(made[1] / f"{name}.npy").ids_N for name in ("adaptive", "placebo")]
    real, dealt = (b[np.argsort(i)] for b, i in zip(bins, ids, strict=True))
    assert 0.1 < np.mean(real == dealt) < 0.45


def test_a_run_over_the_whole_pool_is_of_the_order_track_and_a_shorter_one_a_selection(made, whole, short, tmp_path):
    order.main(made[1] / "scores", made[1] / "random.npy", schedule="random", measure="unigram_nll", bins=BINS)
    for out, steps, track in ((whole, 0, ORDER), (short, 12, SELECTION)):
        cfg = config(made, tmp_path / "none", "random.npy", name="random", steps=steps)
        first, *rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        work = train_gpt.prepare(cfg, lambda _: None)  # a baseline with the losses of the run
        first = json.loads(first) | dict(name="random", order=work.order, identity=work.identity)
        (tmp_path / f"random{steps}").mkdir()
        (tmp_path / f"random{steps}" / "metrics.jsonl").write_text(json.dumps(first) + "\n" + "".join(rows))
        arms = usable_arms(find_runs([tmp_path / f"random{steps}", out]), "random")
        assert as_compared(arms)["tiny"].track == track
        assert any("tiny: stops before" in problem for problem in arms.problems) == (track == SELECTION)


def test_no_micro_batch_holds_more_documents_than_was_made_room_for(made, short):
    work = train_gpt.prepare(config(made, short, steps=12), lambda _: None)
    room = work.pool.most_documents()
    course = adaptive.Course(work.pool, None)
    course.decide(0, None)
    cuts = work.plan.cuts(0)
    assert max(len(course.stream.read(a, b).bounds) - 1 for a, b in zip(cuts, cuts[1:], strict=False)) <= room
    length_N = np.sort(work.train.segments.length_N)
    assert np.cumsum(length_N)[room - 3] <= work.plan.begin_S[1] / work.plan.parts_S[0] + 1


# -- Bad input


def refusal(made, out, **more) -> str:
    with pytest.raises(InputError) as error:
        train_gpt.train(config(made, out, **more), ONE)
    assert not out.exists() and "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_decided_is_a_sentence(made, tmp_path):
    out = tmp_path / "run"
    rare = refusal(made, out, steps=12, data=dict(val_every=6, val_every_late=0))
    assert "adaptive, but with 2 validations in 12 steps weights change 0 times" in rare and "data.val_every" in rare
    assert re.search(
        r"bin \d of 4 has no token among the 20 validation tokens", refusal(made, out, data=dict(val_tokens=20))
    )
    blind = made[1] / "blind.npy"
    for kind in ("npy", "json", "bins.npy"):
        shutil.copy(made[1] / f"adaptive.{kind}", blind.with_suffix(f".{kind}"))
    manifest = json.loads(blind.with_suffix(".json").read_text())
    del manifest["val_segments_sha256"]
    blind.with_suffix(".json").write_text(json.dumps(manifest))
    assert "without bins of validation segments" in refusal(made, out, order="blind.npy")
    os.remove(blind.with_suffix(".bins.npy"))
    manifest = json.loads((made[1] / "adaptive.json").read_text())
    blind.with_suffix(".json").write_text(json.dumps(manifest))
    shutil.copy(made[1] / "adaptive.val.npy", blind.with_suffix(".val.npy"))
    assert "blind.bins.npy: missing" in refusal(made, out, order="blind.npy")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(schedule="adaptive(loss)"), "reward must be progress, not 'loss'"),
        (dict(schedule="adaptive(floor=0)"), "floor = 0.0 is out of range: expected above 0"),
        (dict(schedule="then(adaptive, random)"), "cannot be a part of then"),
        (dict(schedule="reverse(adaptive)"), "no reverse before a run"),
        (dict(schedule="adaptive", multiset="reweight"), "--multiset reweight: an adaptive run repeats nothing"),
        (dict(schedule="adaptive", hold_extremes=0.1), "--hold-extremes 0.1"),
    ],
)
def test_what_cannot_be_ordered_is_a_sentence(made, tmp_path, options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        order.main(made[1] / "scores", tmp_path / "o.npy", **dict(measure="unigram_nll", bins=BINS) | options)


def test_scores_without_validation_are_refused(made, tmp_path):
    shutil.copytree(made[1] / "scores", tmp_path / "scores", ignore=shutil.ignore_patterns("*_val_*"))
    with pytest.raises(InputError, match="no scores of validation segments"):
        order.main(tmp_path / "scores", tmp_path / "o.npy", "unigram_nll", "adaptive", BINS)


def test_a_replay_of_what_is_not_finished_or_not_adaptive_is_refused(made, short, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(short, cut)
    rows = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(InputError, match="not finished"):
        adaptive.main(cut, out=tmp_path / "o.npy")
    (cut / "metrics.jsonl").write_text("".join(row for row in rows if "bin_weights" not in row))
    with pytest.raises(InputError, match="not an adaptive run"):
        adaptive.main(cut, out=tmp_path / "o.npy")
    damaged = tmp_path / "damaged"
    shutil.copytree(short, damaged)
    np.save(adaptive.drawn_path(damaged, 3), np.arange(5))
    with pytest.raises(InputError, match="its content hashes to"):
        adaptive.main(damaged, out=tmp_path / "o.npy")


def test_a_run_whose_past_comes_out_otherwise_is_not_continued(made, tmp_path):
    out = tmp_path / "run"
    assert not train_gpt.train(config(made, out, steps=12, max_seconds=1e-9), ONE)
    np.save(adaptive.drawn_path(out, 0), np.arange(5))
    with pytest.raises(InputError, match="other segments than are drawn now"):
        train_gpt.train(config(made, out, steps=12), ONE)
