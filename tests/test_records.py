"""Run folders are read as they are: what is unfinished, doubled or not comparable is left out, and said."""

import json
import math
import re

import numpy as np
import pytest

from curriculum.compare import ORDER, SELECTION
from curriculum.records import as_compared, find_runs, gather_logs, gather_runs, read_logs, read_run, usable_arms
from data.cli import InputError


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
    code: str = "code",
    making: dict | None = None,
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
    about |= dict(schedule=name, measure="entropy", bins=16) | (making or {})
    if multiset:
        about["multiset_sha256"] = multiset
    settings = dict(
        run=dict(name=name, seed=seed), data=dict(batch_tokens=batch_tokens, order=""), optim=dict(muon_lr=0.02)
    )
    head = dict(kind="run", name=name, seed=seed, steps=steps, config=settings | config, code_sha256=code)
    head["parameters"] = 1
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
    """Folders by arm, and what is said but for the arms of one order, which most of these tests make do with."""
    arms = usable_arms(find_runs([runs.root]), baseline)
    problems = [problem for problem in arms.problems if "one order seed only" not in problem]
    return {name: [run.folder.name for run in members] for name, members in arms.runs.items()}, problems


def compared(runs, baseline: str = "random", **more):
    return as_compared(usable_arms(find_runs([runs.root]), baseline), **more)


# -- One run


def test_a_run_is_what_its_rows_say(runs):
    run = read_run(runs("a", name="fold", order="o", final=3.0, val_tokens=77))
    assert (run.name, run.order_key, run.validation, run.final_val_nats) == ("fold", "o", ("val", 77), 3.0)
    tokens, nats = run.curve("val_nats")
    assert tokens.tolist() == [1000, 2000] and nats.tolist() == [3.5, 3.0]
    assert run.curve("val_nats", "step")[0].tolist() == [10, 20]
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


def test_runs_that_share_an_order_are_one_draw_of_it(runs):
    """Two weight seeds on one order say nothing of the spread between orders: they are averaged."""
    for i, order in enumerate(("r0", "r0", "r1")):
        runs(f"random{i}", name="random", order=order, final=3.0 + i, seed=i)
    runs("up0", name="up", order="u0", final=3.0)
    runs("up1", name="up", order="u1", final=3.0)
    arms, (problem,) = arms_of(runs)
    assert arms == {"random": ["random0", "random1", "random2"], "up": ["up0", "up1"]}
    assert problem == "random: 3 runs on 2 data orders: those of one order are averaged, n is 2"
    assert compared(runs)["random"].mean_U.tolist() == [3.5, 5.0]


def test_one_order_seed_is_said(runs):
    for i in range(2):
        runs(f"random{i}", name="random", order=f"r{i}", final=3.0)
        runs(f"up{i}", name="up", order="u", final=3.0, seed=i)
    (problem,) = usable_arms(find_runs([runs.root]), "random").problems
    assert problem.startswith("up: one order seed only")


def test_the_configuration_with_most_runs_stays_whatever_came_first(runs):
    for i in range(2):
        runs(f"random{i}", name="random", order=f"r{i}", final=3.0)
    runs("up0", name="up", order="u0", final=1.0, digest="other")
    for i in (1, 2):
        runs(f"up{i}", name="up", order=f"u{i}", final=3.0)
    arms, (problem,) = arms_of(runs)
    assert arms["up"] == ["up1", "up2"]
    assert problem.startswith(f"{runs.root / 'up0'}: another configuration under the name up than")


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_run_without_a_final_number_is_left_out_named_and_counted(runs, loss):
    runs("random0", name="random", order="r0", final=3.0)
    runs("up0", name="up", order="u0", final=3.0)
    rows = run_rows("up", "u1", 3.0)
    rows[-1]["val_nats"] = loss
    write_run(runs.root / "up1", rows)
    arms, (problem,) = arms_of(runs)
    assert arms["up"] == ["up0"] and compared(runs)["up"].unfinished == 1
    reason = "not finished" if loss is None else f"its final loss is {loss}"
    assert problem == f"{runs.root / 'up1'}: {reason}: left out"


def test_a_folder_that_cannot_be_read_is_named_beside_the_others(runs):
    runs("random0", name="random", order="r0", final=3.0)
    (runs.root / "broken").mkdir()
    (runs.root / "broken" / "metrics.jsonl").write_bytes(b"\xff\x00\n")
    (found,), (problem,) = gather_runs([runs.root, runs.root])
    assert found.name == "random"
    assert problem.startswith(f"{runs.root / 'broken' / 'metrics.jsonl'}: line 1 is not JSON")
    assert problem.endswith(": left out")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        find_runs([runs.root])


def test_an_arm_that_saw_other_tokens_is_selection(runs):
    runs("random0", name="random", order="r0", final=3.0)
    runs("up0", name="up", order="u0", final=3.0, multiset="half")
    runs("down0", name="down", order="d0", final=3.0)
    arms, (problem,) = arms_of(runs)
    assert "up" in arms and problem.startswith("up: trained on other tokens than random")
    tracks = {name: arm.track for name, arm in compared(runs).items()}
    assert tracks == dict(random=ORDER, up=SELECTION, down=ORDER)


def test_an_arm_whose_seeds_saw_different_tokens_is_selection(runs):
    for i in range(2):
        runs(f"random{i}", name="random", order=f"r{i}", final=3.0)
        runs(f"up{i}", name="up", order=f"u{i}", final=3.0, multiset="all" if i else "half")
    assert compared(runs)["up"].track == SELECTION


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (dict(steps=40, multiset="more"), "steps"),
        (dict(batch_tokens=200), "data.batch_tokens"),
        (dict(optim=dict(muon_lr=0.04)), "optim.muon_lr"),
        (dict(model=dict(num_layers=6)), "model.num_layers"),
    ],
)
def test_an_arm_that_differs_in_more_than_its_order_is_not_tested(runs, change, settings):
    """A longer run, or one with another learning rate, beats the baseline without any curriculum."""
    runs("random0", name="random", order="r0", final=3.0)
    runs("up0", **dict(name="up", order="u0", final=2.9) | change)
    _, (problem,) = arms_of(runs)
    assert problem.startswith(f"up: differs from random in {settings}: ") and problem.endswith("not tested")
    assert compared(runs)["up"].baseline == ""


def test_an_arm_of_other_settings_has_the_random_of_its_settings_as_baseline(runs):
    runs("random0", name="random", order="r0", final=3.0)
    for name, schedule in (("random.fast", "random"), ("up.fast", "up")):
        making = dict(schedule=schedule)
        runs(name, name=name, order=name, final=2.9, optim=dict(muon_lr=0.04), making=making)
    _, (problem,) = arms_of(runs)
    assert problem == "up.fast: compared with random.fast, which is random with its settings"
    baselines = {name: arm.baseline for name, arm in compared(runs).items()}
    assert baselines == {"random": "random", "random.fast": "random.fast", "up.fast": "random.fast"}


def test_other_code_is_said(runs):
    runs("random0", name="random", order="r0", final=3.0)
    runs("up0", name="up", order="u0", final=3.0, code="newer")
    _, (problem,) = arms_of(runs)
    assert problem.startswith("up: not all of its runs and those of random were trained by the same version")


def test_where_files_lie_is_no_difference(runs):
    for name, place in (("random", "here"), ("up", "there")):
        data = dict(shards=place, val_shards=place, order=f"{place}.npy", batch_tokens=100)
        runs(name, name=name, order=name, final=3.0, data=data)
    assert arms_of(runs)[1] == []


def test_an_arm_that_stops_before_its_order_ends_is_selection(runs):
    runs("random0", name="random", order="r0", final=3.0)
    runs("up0", name="up", order="u0", final=2.9, order_tokens=2001)
    _, (problem,) = arms_of(runs)
    assert problem.startswith("up: stops before its order ends")
    assert compared(runs)["up"].track == SELECTION


# -- Controls


def test_controls_are_known_by_their_orders_and_not_by_their_names(runs):
    arms = {
        "random": dict(schedule="random"),
        "a": dict(schedule="fold(K=5)"),
        "b": dict(schedule="placebo(schedule=fold(K=5))"),
        "c": dict(schedule="fold(K=5)", measure="length"),
        "d": dict(schedule="fold(K=5)", measure="nll"),  # of which there is no placebo
        "e": dict(schedule="placebo(schedule=fold(K=4))"),
        "f": dict(schedule="placebo(schedule=fold(K=5))", bins=8),
        "g": dict(schedule="placebo(schedule=fold(K=5))", measure="nll", bins=8),
        "h": dict(schedule="fold(K=5)", bins=8),
        "i": dict(schedule="placebo(schedule=fold(K=5))", measure="nll", multiset="reweight"),
    }
    for name, making in arms.items():
        runs(name, name=name, order=name, final=3.0, making=making)
    found = {name: (arm.placebo, arm.length) for name, arm in compared(runs).items()}
    assert {name: pair for name, pair in found.items() if any(pair)} == {
        "a": ("b", "c"),
        "d": ("", "c"),
        "h": ("f", ""),
    }


def test_a_control_of_other_tokens_is_none(runs):
    runs("random", name="random", order="r", final=3.0)
    for name, schedule in (("a", "fold(K=5)"), ("b", "placebo(schedule=fold(K=5))")):
        multiset = "all" if name == "a" else "others"
        runs(name, name=name, order=name, final=3.0, making=dict(schedule=schedule), multiset=multiset)
    assert compared(runs)["a"].placebo == ""


def test_a_control_of_other_settings_is_none(runs):
    runs("random", name="random", order="r", final=3.0)
    runs("a", name="a", order="a", final=3.0, making=dict(schedule="fold(K=5)"))
    placebo = dict(schedule="placebo(schedule=fold(K=5))")
    runs("b", name="b", order="b", final=3.0, making=placebo, optim=dict(muon_lr=0.04))
    assert compared(runs)["a"].placebo == ""


# -- Tokens


def test_a_baseline_at_another_length_gives_the_slope(runs):
    """The nearest one; its own arm is no longer compared with anything."""
    for i in range(2):
        runs(f"random{i}", name="random", order=f"r{i}", final=3.0)
        for share, steps in (("half", 10), ("fifth", 4)):
            about = dict(name=f"random-{share}", order=f"{share}{i}", steps=steps, multiset=share)
            final = dict(half=3.1, fifth=3.3)[share] + 0.01 * i
            rows = run_rows(**about, final=final, making=dict(schedule="random"))
            rows.append(dict(step=steps, tokens=100 * steps, val_nats=final))
            write_run(runs.root / f"{share}{i}", rows)
    slope = compared(runs)["random"].slope
    assert slope.nats == pytest.approx((3.0 - 3.105) / math.log(2))
    assert slope.said == "baseline at 0.5 of the tokens, n = 2"
    assert {name: arm.baseline for name, arm in compared(runs).items()}["random-half"] == "random-half"


def test_without_one_the_baselines_own_curves_do(runs):
    runs("random0", name="random", order="r0", final=3.0)
    runs("up0", name="up", order="u0", final=2.9)
    found = compared(runs)
    assert found["random"].slope.nats == pytest.approx(-0.5 / math.log(2))  # 3.5 at half of the tokens
    assert found["random"].slope.said == "the baseline's own last fifth, which errs towards zero"
    assert found["up"].slope is None


def test_where_runs_reach_a_target(runs):
    runs("random0", name="random", order="r0", final=3.0)
    runs("random1", name="random", order="r1", final=3.4)
    found = compared(runs, target=3.25)["random"]
    np.testing.assert_allclose(found.tokens_to_target_R, [1500, math.nan])
    np.testing.assert_allclose(found.steps_to_target_R, [15, math.nan])
    assert list(compared(runs)["random"].tokens_to_target_R) == []


def test_scores_are_charged_to_orders_by_a_models_scores(runs):
    arms = {
        "random": "entropy",
        "up": "nll - entropy",
        "short": "length",
        "late": "learnability",
        "mixed": "length/nll",
    }
    for name, measure in arms.items():
        runs(name, name=name, order=name, final=3.0, making=dict(measure=measure))
    charged = {name for name, arm in compared(runs, scoring_tokens=5.0).items() if arm.scoring_tokens}
    assert charged == {"up", "late", "mixed"}


# -- Logs of the public speedrun

SOURCE = 'print0(f"step:{step}/{train_steps} val_loss:{val_loss:.4f} train_time:{ms:.0f}ms")\n====\n'


def log_text(losses, steps: int = 20, unit: str = "ms", every: int = 10) -> str:
    lines = [
        f"step:{step}/{steps} val_loss:{loss} train_time:{1000 * i if unit == 'ms' else i}{unit} step_avg:1.00ms"
        for i, (step, loss) in enumerate(zip(range(0, steps + 1, every), losses, strict=False))
    ]
    return SOURCE + "\n".join(lines) + "\nstep:5/20 train_time:1ms step_avg:2ms\npeak memory: 1 MiB\n"


@pytest.mark.parametrize("unit", ["ms", "s"])
def test_a_public_log_is_read(tmp_path, unit):
    (tmp_path / "a.txt").write_text(log_text(["10.8258", "4.5", "3.2787"], unit=unit))
    (log,) = read_logs(tmp_path / "a.txt")
    assert (log.steps, log.final_val_nats, log.time_s) == (20, 3.2787, 2.0)
    assert log.step_P.tolist() == [0, 10, 20] and log.loss_P.tolist() == [10.8258, 4.5, 3.2787]


def test_several_trials_in_one_log_are_several_runs(tmp_path):
    (tmp_path / "a.txt").write_text(log_text(["10.8", "4.5", "3.27"]) + log_text(["10.8", "4.4", "3.28"]))
    assert [log.final_val_nats for log in read_logs(tmp_path / "a.txt")] == [3.27, 3.28]


def test_logs_are_grouped_by_folder_and_what_is_left_out_is_named(tmp_path):
    for name, text in {
        "one/a.txt": log_text(["10.8", "4.5", "3.27"]),
        "one/b.log": log_text(["10.8", "4.5", "3.28"]),
        "one/killed.txt": log_text(["10.8", "4.5"]),
        "one/nan.txt": log_text(["10.8", "nan", "nan"]),
        "one/longer.txt": log_text(["10.8", "4.5", "3.1"], steps=40, every=20),
        "one/README.txt": "no log",
        "two/one/a.txt": log_text(["10.8", "4.5", "3.3"]),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    groups, problems = gather_logs([tmp_path, tmp_path / "one"])
    second = str(tmp_path / "two/one")
    found = {name: [log.final_val_nats for log in logs] for name, logs in groups.items()}
    assert found == {"one": [3.27, 3.28], second: [3.3]}
    said = "\n".join(sorted(problems))
    for name, reason in {
        "README.txt": "no line of the form",
        "killed.txt": "stops at step 10 of 20",
        "nan.txt": "its final loss is nan",
        "longer.txt": "a run of 40 steps, most of its folder have 20",
    }.items():
        assert re.search(f"{name}: {reason}.*: left out", said)


def test_without_any_log_the_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="no run there"):
        gather_logs([tmp_path])
    (tmp_path / "a.txt").write_text("step:1/1 val_loss:3.x train_time:1ms")
    with pytest.raises(InputError, match="a val_loss is no number"):
        gather_logs([tmp_path])
