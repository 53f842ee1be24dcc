"""Run folders are read as they are: what is unfinished, doubled or not comparable is left out, and said."""

import json
import re

import pytest

from curriculum.records import find_runs, read_run, usable_arms
from data.cli import InputError
from scripts.leaderboard import main as leaderboard


def run_rows(
    name: str,
    order: str,
    final: float,
    *,
    seed: int = 0,
    steps: int = 20,
    batch_tokens: int = 100,
    multiset: str | None = "all",
    val: str = "val",
    val_tokens: int = 1000,
    order_tokens: int | None = None,
    digest: str | None = None,
    **config,
) -> list[dict]:
    """metrics.jsonl of a run of `steps` steps, validated every 10, whose loss falls to `final`."""
    identity = dict(
        digest=digest or f"digest of {name}",
        name=name,
        seed=seed,
        order_sha256=order,
        segments_sha256="segments",
        val_segments_sha256=val,
    )
    about = dict(recipe=f"recipe of {name}", order_sha256=order, tokens=order_tokens or steps * batch_tokens)
    if multiset:
        about["multiset_sha256"] = multiset
    settings = dict(run=dict(name=name, seed=seed), data=dict(batch_tokens=batch_tokens), optim=dict(muon_lr=0.02))
    head = dict(kind="run", name=name, seed=seed, steps=steps, config=settings | config)
    rows = [head | dict(identity=identity, order=about, val_tokens=val_tokens)]
    for step in range(10, steps + 1, 10):
        at = dict(step=step, tokens=step * batch_tokens)
        rows.append(at | dict(train_nats=final + 1.0, time_s=0.1 * step))
        rows.append(at | dict(val_nats=final + (steps - step) / steps, bin_nats=[final, final], time_s=0.1 * step))
    return rows


def write_run(folder, rows: list[dict], tail: str = ""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Write a run below a temporary folder: runs("random/seed0", name="random", ...)."""

    def write(place: str, tail: str = "", **about):
        return write_run(tmp_path / place, run_rows(**about), tail)

    write.root = tmp_path
    return write


def arms_of(runs, baseline: str = "random"):
    arms, problems = usable_arms(find_runs([runs.root]), baseline)
    return {name: [run.folder.name for run in members] for name, members in arms.items()}, problems


# -- One run


def test_a_run_is_what_its_rows_say(runs):
    run = read_run(runs("a", name="fold", order="o", final=3.0, val_tokens=77))
    assert (run.name, run.order_key, run.validation, run.final_val_nats) == ("fold", "o", ("val", 77), 3.0)
    tokens, nats = run.curve("val_nats")
    assert tokens.tolist() == [1000, 2000] and nats.tolist() == [3.5, 3.0]
    assert run.curve("train_nats")[1].tolist() == [4.0, 4.0]
    assert [len(column) for column in run.curve("nothing")] == [0, 0]


def test_half_a_last_line_is_not_read(runs):
    """Wherever the kill fell: inside the JSON, or between it and the newline that makes it a row."""
    rows = run_rows("a", "o", 3.0)
    last = json.dumps(rows[-1])
    for cut in (1, len(last) // 2, len(last)):
        folder = write_run(runs.root / f"cut{cut}", rows[:-1], last[:cut])
        assert read_run(folder).rows == rows[1:-1] and read_run(folder).final_val_nats is None
    assert read_run(write_run(runs.root / "whole", rows)).final_val_nats == 3.0


def test_a_run_is_finished_when_its_last_step_was_validated(runs):
    rows = run_rows("a", "o", 3.0)
    for number, kept in enumerate((rows[:1], rows[:3], rows[:-1])):
        assert read_run(write_run(runs.root / f"{number}", kept)).final_val_nats is None


def test_a_row_written_twice_counts_as_it_was_written_last(runs):
    """A resumed run may validate its last step again."""
    rows = run_rows("a", "o", 3.0)
    assert read_run(write_run(runs.root / "a", [*rows, rows[-1] | {"val_nats": 2.9}])).final_val_nats == 2.9


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "its first row does not describe a run"),
        ('{"kind": "run"', "its first row does not describe a run"),
        ('{"step": 1, "val_nats": 3}\n', "its first row does not describe a run"),
        ('{"kind": "run"}\nhello\n{}\n', "line 2 is not JSON: 'hello'"),
        ('{"kind": "run"}\n\n', "line 2 is not JSON: ''"),
    ],
)
def test_what_no_run_of_ours_wrote_is_refused(tmp_path, text, sentence):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ["5\n", '{"kind": "run"}\n7\n', '{"kind": "run"}\n{"step": 1}\n'])
def test_json_of_another_program_is_refused_as_well(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match="metrics.jsonl"):
        usable_arms([read_run(tmp_path)], "random")


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(InputError, match="no metrics.jsonl there: not a run folder"):
        read_run(tmp_path)
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError, match="no run there"):
            find_runs([place])


def test_places_that_overlap_give_every_run_once(runs):
    folders = [runs(f"random/seed{i}", name="random", order=f"o{i}", final=3.0) for i in range(3)]
    found = find_runs([runs.root / "random", folders[1], runs.root])
    assert [run.folder for run in found] == folders


# -- Arms


def test_arms_are_runs_by_name_the_baseline_first(runs):
    for arm in ("fold", "random", "up"):
        for i in range(2):
            runs(f"{arm}/{arm}{i}", name=arm, order=f"{arm}{i}", final=3.0)
    arms, problems = arms_of(runs)
    assert list(arms) == ["random", "fold", "up"] and problems == []
    assert arms == {arm: [f"{arm}0", f"{arm}1"] for arm in arms}


def test_a_baseline_that_did_not_finish_is_missing(runs):
    runs("up", name="up", order="o", final=3.0)
    write_run(runs.root / "random", run_rows("random", "o", 3.0)[:-1])
    with pytest.raises(InputError, match="--baseline random: no finished run has that name; finished are: up"):
        arms_of(runs)
    (runs.root / "up" / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="finished are: none"):
        arms_of(runs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(val="other"), "validated on other tokens than .*: left out"),
        (dict(val_tokens=999), "validated on other tokens than .*: left out"),
        (dict(digest="other"), "another configuration under the name up than .*up0: left out"),
        (dict(order="up0"), "the same run .* as another folder: left out"),
    ],
)
def test_a_run_that_cannot_stand_beside_the_others_is_left_out_with_its_reason(runs, change, reason):
    runs("random0", name="random", order="r0", final=3.0)
    runs("up0", name="up", order="up0", final=2.9)
    runs("up1", **dict(name="up", order="up1", final=1.0) | change)
    arms, (problem,) = arms_of(runs)
    assert arms == {"random": ["random0"], "up": ["up0"]}
    assert re.fullmatch(f"{re.escape(str(runs.root / 'up1'))}: {reason}", problem)


def test_an_unfinished_run_is_left_out_and_named(runs):
    runs("random0", name="random", order="r0", final=3.0)
    write_run(runs.root / "random1", run_rows("random", "r1", 3.0)[:-1])
    arms, problems = arms_of(runs)
    assert arms == {"random": ["random0"]}
    assert problems == [f"{runs.root / 'random1'}: not finished: left out"]


def test_every_run_is_used_or_named(runs):
    """Nothing is dropped in silence."""
    runs("random0", name="random", order="r0", final=3.0)
    runs("random1", name="random", order="r1", final=3.0, digest="other")
    runs("up0", name="up", order="u0", final=3.0, val="other")
    runs("up1", name="up", order="u1", final=3.0)
    write_run(runs.root / "up2", run_rows("up", "u2", 3.0)[:2])
    arms, problems = arms_of(runs)
    used = {folder for members in arms.values() for folder in members}
    for name in ("random0", "random1", "up0", "up1", "up2"):
        assert (name in used) != any(p.startswith(f"{runs.root / name}: ") for p in problems)


def test_runs_that_share_an_order_are_flagged_and_kept(runs):
    """Two weight seeds on one order say nothing of the spread between orders."""
    runs("random0", name="random", order="r0", final=3.0)
    runs("random1", name="random", order="r0", final=3.1, seed=1)
    runs("up0", name="up", order="u0", final=3.0)
    runs("up1", name="up", order="u1", final=3.0)
    arms, (problem,) = arms_of(runs)
    assert arms == {"random": ["random0", "random1"], "up": ["up0", "up1"]}
    assert problem.startswith("random: some runs share one data order")


def test_an_arm_that_saw_other_tokens_is_flagged_as_selection(runs):
    runs("random0", name="random", order="r0", final=3.0)
    runs("up0", name="up", order="u0", final=3.0, multiset="half")
    runs("down0", name="down", order="d0", final=3.0)
    arms, (problem,) = arms_of(runs)
    assert "up" in arms and problem.startswith("up: trained on other tokens than random")


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (dict(steps=40), "steps"),
        (dict(batch_tokens=200), "data.batch_tokens"),
        (dict(optim=dict(muon_lr=0.04)), "optim.muon_lr"),
        (dict(model=dict(num_layers=6)), "model.num_layers"),
    ],
)
def test_an_arm_that_differs_in_more_than_its_order_is_flagged(runs, change, settings):
    """A longer run, or one with another learning rate, beats the baseline without any curriculum."""
    runs("random0", name="random", order="r0", final=3.0)
    runs("up0", **dict(name="up", order="u0", final=2.9) | change)
    _, (problem,) = arms_of(runs)
    assert problem.startswith(f"up: differs from random in {settings}: ")


def test_where_files_lie_is_no_difference(runs):
    for name, place in (("random", "here"), ("up", "there")):
        data = dict(shards=place, val_shards=place, order=f"{place}.npy", batch_tokens=100)
        runs(name, name=name, order=name, final=3.0, data=data)
    assert arms_of(runs)[1] == []


def test_arms_that_stop_before_their_order_ends_are_flagged(runs):
    runs("random0", name="random", order="r0", final=3.0)
    runs("up0", name="up", order="u0", final=2.9, order_tokens=2001)
    _, (problem,) = arms_of(runs)
    assert problem.startswith("up: stops before its order ends")


# -- The table


def test_the_leaderboard_shows_every_arm_and_says_what_it_left_out(runs, capsys):
    for i, final in enumerate((3.0, 3.2)):
        runs(f"random{i}", name="random", order=f"r{i}", final=final)
        runs(f"up{i}", name="up", order=f"u{i}", final=final - 0.2)
    write_run(runs.root / "down0", run_rows("down", "d0", 3.0)[:-1])
    leaderboard((runs.root,), baseline="random")
    table, _, notes = capsys.readouterr().out.partition("note: ")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [row[:3] for row in rows[2:]] == [["random", "2", "3.1000"], ["up", "2", "2.9000"]]
    assert notes.strip() == f"{runs.root / 'down0'}: not finished: left out"


def test_a_report_cannot_be_a_folder(runs):
    runs("random0", name="random", order="r0", final=3.0)
    with pytest.raises(InputError, match="is a folder; name an .html file"):
        leaderboard((runs.root,), baseline="random", out=runs.root)
