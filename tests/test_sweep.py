"""Sweeps: what a file expands to, and runs that are killed, crash, are refused, confirmed and handed to others."""

import doctest
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from curriculum import score
from curriculum.config import load
from curriculum.records import read_run
from curriculum.schedules import parse
from data.cli import InputError
from scripts import sweep
from scripts.sweep import Arm, Sweep, control_of, expand, read_sweep

ROOT = Path(__file__).parents[1]
CONFIG = """
[run]
checkpoint_seconds = 1e-9
log_every = 1
[data]
shards = "{corpus}"
seq_len = 64
batch_tokens = 256
micro_batch_tokens = 128
val_tokens = 1000
val_every = 4
[model]
num_layers = 1
model_dim = 16
head_dim = 8
num_value_embeds = 0
"""
SWEEP = """
config = "base.toml"
scores = "{scores}"
tokens = 2000
seeds = {{ order = 2 }}
[[grid]]
measure = "unigram_nll"
schedule = "increasing"
bins = 4
"""
# Stands where train_gpt.py would: writes what it writes, at once, with nothing but the standard library. A file named
# after a run makes it crash: "once" the first time, "always" every time.
FAKE_TRAINER = """
import json, os, signal, sys, tomllib
from pathlib import Path
config = tomllib.loads(Path(sys.argv[1]).read_text())
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert given.keys() == {"--data.order", "--run.name", "--run.seed", "--run.out_dir"}
name, seed, folder = given["--run.name"], int(given["--run.seed"]), Path(given["--run.out_dir"])
order = json.loads(Path(given["--data.order"]).with_suffix(".json").read_text())
config["run"] |= dict(name=name, seed=seed)
identity = dict(digest=order["recipe"], name=name, seed=seed, order_sha256=order["order_sha256"])
identity["val_segments_sha256"] = ""
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps(dict(identity=identity, config=config)))
with open(folder.parents[1] / "environment.jsonl", "a") as file:
    seen = {key: os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    file.write(json.dumps(seen) + "\\n")
trap = folder.parents[1] / f"{name}-{folder.name}"
if trap.exists():
    print("about to crash", flush=True)
    if trap.read_text() == "once":
        trap.unlink()
    os.kill(os.getpid(), signal.SIGKILL)
kept = ("recipe", "order_sha256", "multiset_sha256", "measure", "schedule", "bins", "seed")
about = {key: order[key] for key in kept}
first = dict(kind="run", name=name, seed=seed, steps=8, config=config, identity=identity, val_tokens=1000,
             order=about | dict(tokens=2000), code_sha256="", hardware={}, processes=1)
nats = 5 + 0.1 * ("placebo" in name) - 0.2 * ("decreasing" in name) + 0.01 * (seed % 3)
last = dict(step=8, tokens=2000, val_nats=nats, time_s=1.0)
(folder / "metrics.jsonl").write_text(json.dumps(first) + "\\n" + json.dumps(last) + "\\n")
"""


@pytest.fixture(scope="module")
def scores(tiny_corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "scores"
    score.main(str(tiny_corpus), "none", out, max_len=64)
    return out


@pytest.fixture
def file(tiny_corpus, scores, tmp_path) -> Path:
    """A sweep of random and one arm, two order seeds each."""
    (tmp_path / "base.toml").write_text(CONFIG.format(corpus=tiny_corpus))
    path = tmp_path / "tiny.toml"
    path.write_text(SWEEP.format(scores=scores))
    return path


@pytest.fixture
def fake_trainer(tmp_path, monkeypatch) -> None:
    path = tmp_path / "fake_trainer.py"
    path.write_text(FAKE_TRAINER)
    monkeypatch.setattr(sweep, "TRAINER", (str(path),))
    monkeypatch.setattr("curriculum.report.render", lambda *_: "<html>")  # its runs have no curves to draw


def edited(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def losses(out: Path) -> dict[str, list]:
    """Every loss that every run of a sweep logged, in order."""
    found = {}
    for path in sorted(out.glob("*/order*/metrics.jsonl")):
        rows = read_run(path.parent).rows
        found[str(path.parent.relative_to(out))] = [
            [row["step"], row["tokens"], row.get("train_nats"), row.get("val_nats"), row.get("bin_nats")]
            for row in rows
        ]
    return found


def grid(*grids: dict, **settings) -> list[Arm]:
    return expand(Sweep(config="", scores="", grid=grids, **settings))


# --- what a file expands to -------------------------------------------------------------------------------------------


def test_the_doctests_hold():
    assert doctest.testmod(sweep).failed == 0 < doctest.testmod(sweep).attempted


def test_axes_are_crossed_and_grids_added_up_each_arm_once():
    one = dict(measure=["nll", "entropy"], schedule=["increasing", "decreasing"], bins=[4, 16], tail=[0, 0.2])
    assert len(grid(one)) == 1 + 16
    again = dict(measure="nll", schedule="increasing(sigma=0.08)", bins=[16, 64])  # the first is in `one`: the default
    arms = grid(one, again)
    assert len(arms) == 1 + 16 + 1
    assert [arm.kind for arm in arms] == ["random"] + 17 * ["arm"]
    assert len({arm.name for arm in arms}) == len(arms)
    tails = {parse(arm.schedule).text for arm in arms if arm.schedule.startswith("then")}
    assert tails == {
        parse(f"then({name}, random, tau=0.2)").text for name in ("increasing", "decreasing")
    }  # fmt: skip


def test_names_in_braces_are_axes_and_schedules_without_them_are_not_repeated():
    arms = grid(dict(measure="nll", schedule=["fold({K})", "increasing"], K=[2, 3, 5]))
    assert sorted(arm.schedule for arm in arms[1:]) == ["fold(2)", "fold(3)", "fold(5)", "increasing"]


def test_every_combination_of_settings_has_its_own_random():
    axes = {"measure": "nll", "schedule": ["increasing", "fold"], "optim.cooldown_frac": [0.4, 0.7], "order.epochs": 2}
    arms = grid(axes)
    assert len(arms) == 2 * 3
    bases = [arm for arm in arms if arm.kind == "random"]
    assert {arm.settings for arm in bases} == {(("optim.cooldown_frac", x), ("order.epochs", 2)) for x in (0.4, 0.7)}
    assert len({arm.name for arm in arms}) == len(arms)


def test_controls_are_of_every_arm_and_an_arm_is_no_control():
    axes = dict(measure=["nll", "length"], schedule=["increasing", "reverse(increasing)"])
    arms = grid(axes, controls=("placebo", "length", "reverse"))
    found = {(arm.measure, parse(arm.schedule).text): arm.kind for arm in arms}
    up, down = (parse(text).text for text in ("increasing", "reverse(increasing)"))
    for measure in ("nll", "length"):
        for text in (up, down):
            assert found[measure, text] == "arm"
            assert found[measure, parse(f"placebo({text})").text] == "placebo"
    assert len(found) == len(arms) == 1 + 4 + 4
    assert control_of(Arm("", "nll", "fold(3)", 4), "length").measure == "length"


def test_seeds_are_nested_and_random_may_have_more_of_them(tmp_path):
    settings = Sweep(
        config="", scores="", grid=({"measure": "nll", "schedule": "fold"},), seeds=dict(order=2, init=2, random=3)
    )
    pairs = list(sweep.Plan(tmp_path, settings, expand(settings), settings.seeds, 10).pairs())
    by_arm = {arm: [(k, s) for a, k, s in pairs if a is arm] for arm, _, _ in pairs}
    counts = {arm.kind: len(found) for arm, found in by_arm.items()}
    assert counts == dict(random=6, arm=4)
    assert len({s for _, s in by_arm[pairs[0][0]]}) == 6  # no init seed under two orders
    assert [k for _, k, _ in pairs] == sorted(k for _, k, _ in pairs)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tokens = 2000", "token = 2000", r"unknown setting token; known are config, scores, tokens"),
        ("order = 2", "orders = 2", r"unknown setting seeds.orders; known are order, init, random"),
        ("order = 2", "order = 2.5", r"seeds.order = 2.5: input should be a valid integer"),
        ("order = 2", "order = 0", r"seeds.order = 0"),
        ("tokens = 2000", "tokens = true", r"tokens = True: input should be a valid integer"),
        ("tokens = 2000", 'controls = ["placbo"]', r"controls.0 = 'placbo'"),
        ("tokens = 2000", "tokens = ", r"not TOML"),
        ('config = "base.toml"', "", r"config is missing"),
        ('config = "base.toml"', 'config = "bse.toml"', r"bse.toml: no such config"),
        ('schedule = "increasing"', "", r"grid: schedule is missing"),
        ('schedule = "increasing"', 'schedule = "increasin"', r"unknown name 'increasin'; known are random"),
        ('schedule = "increasing"', 'schedule = ["random"]', r"random: it is the baseline"),
        ('schedule = "increasing"', 'schedule = "fold({K})"', r"there is no axis K; known are"),
        ('"unigram_nll"', '"unigram_nl"', r"unigram_nl"),
        ("bins = 4", "bins = []", r"bins = \[\]: expected at least one value"),
        ("bins = 4", "bins = [true]", r"bins = True: expected a whole number from 1 to 1024"),
        ("bins = 4", "tail = 1.0", r"tail = 1.0: expected a share"),
        ("bins = 4", "binz = 4", r"unknown axis binz; known are measure, schedule, bins, tail"),
        ("bins = 4", '"optm.muon_lr" = 0.1', r"unknown axis optm.muon_lr"),
        ("bins = 4", '"optim.muon_rl" = 0.1', r"unknown setting optim.muon_rl; known are muon_lr"),
        ("bins = 4", '"optim.muon_lr" = "high"', r"optim.muon_lr = 'high'"),
        ("bins = 4", '"run.seed" = 3', r"run.seed is set by the sweep"),
        ("bins = 4", '"order.epoch" = 3', r"curriculum.order has no option epoch; known are .*order.epochs"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_written(file, tmp_path, old, new, words):
    with pytest.raises(InputError, match=words):
        sweep.main(edited(file, old, new), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(gpus=(0, 1, 2), gpus_per_run=2), "not a multiple"),
        (dict(gpus=(0, 0)), "each GPU once"),
        (dict(slots=-1), "expected 0 or more"),
        (dict(confirm=("top=3",)), "expected top=K seeds=N"),
        (dict(confirm=("top=0", "seeds=8")), "expected top=K seeds=N"),
        (dict(confirm=("top=1", "seeds=8")), "the screen comes first"),
    ],
)
def test_options_that_cannot_be_are_refused(file, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        sweep.main(file, out=tmp_path / "out", **options)


def test_a_dry_run_says_what_it_would_cost_and_resolve_and_writes_nothing(file, tmp_path, capsys):
    sweep.main(file, out=tmp_path / "out", dry_run=True, tokens_per_second=10, sd=0.01, slots=2)
    said = capsys.readouterr().out
    assert "2 arms, 4 runs, 8,000 tokens; 0 runs finished" in said
    assert "7 min to go" in said  # 8,000 tokens, 10 a second in each of two slots
    from curriculum.compare import smallest_effect

    assert f"resolves {smallest_effect(0.01, 2, 2, comparisons=1):.4f} nats at 80 % power" in said
    assert not (tmp_path / "out").exists()


# --- runs -------------------------------------------------------------------------------------------------------------


def start(file: Path, out: Path, *options: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "scripts.sweep", str(file), "--out", str(out), "--slots", "2", "--threads", "1"]
    pipe = subprocess.PIPE
    return subprocess.Popen([*line, *options], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def test_killed_and_continued_it_ends_with_the_runs_of_an_undisturbed_sweep(file, tmp_path):
    """With the real trainer. The undisturbed runs are made here, in one process, by the trainer's own function."""
    edited(file, "order = 2", "order = 1")
    import torch

    import train_gpt
    from curriculum.config import validate

    out = tmp_path / "out"
    process = start(file, out)
    deadline = time.monotonic() + 120
    while process.poll() is None and not any(
        sum(x[2] is not None for x in v) >= 2 for v in losses_so_far(out).values()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    unfinished = [path for path in out.glob("*/order*-seed*") if path.is_dir() and sweep.final_loss(path) is None]
    assert unfinished, "it was killed too late to prove anything"
    process = start(file, out)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "2 runs" in said and "| random" in said and (out / "report.html").exists()
    found = losses(out)
    assert len(found) == 2

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for folder in [out / name for name in found]:
            stored = json.loads((folder / "config.json").read_text())["config"]
            stored["run"]["out_dir"] = str(tmp_path / "undisturbed" / folder.relative_to(out))
            train_gpt.train(validate(stored, "test"), train_gpt.World())
    finally:
        torch.set_num_threads(threads)
    assert losses(tmp_path / "undisturbed") == found
    assert len({str(rows) for rows in found.values()}) == 2  # different runs


def losses_so_far(out: Path) -> dict[str, list]:
    try:
        return losses(out)
    except InputError:  # a first row is being written
        return {}


def test_a_crashed_run_is_retried_once_and_reported_and_the_others_go_on(file, tmp_path, fake_trainer, capsys):
    out = tmp_path / "out"
    out.mkdir()
    once, always = out / "random-order0-seed0", out / "unigram_nll-increasing-b4-order1-seed1"
    once.write_text("once")
    always.write_text("always")
    with pytest.raises(SystemExit) as ended:
        sweep.main(file, out=out, slots=2, threads=3)
    assert ended.value.code == 1
    said, errors = capsys.readouterr()
    assert "crashed   random/order0-seed0: SIGKILL, 'about to crash'" in said
    assert re.search("failed 2 times: unigram_nll-increasing-b4/order1-seed1: SIGKILL, 'about to crash'", errors)
    attempts = [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]
    assert sorted((row["run"], row["exit"]) for row in attempts) == [
        ("random/order0-seed0", -9),
        ("random/order0-seed0", 0),
        ("random/order1-seed1", 0),
        ("unigram_nll-increasing-b4/order0-seed0", 0),
        ("unigram_nll-increasing-b4/order1-seed1", -9),
        ("unigram_nll-increasing-b4/order1-seed1", -9),
    ]
    given = [json.loads(line) for line in (out / "environment.jsonl").read_text().splitlines()]
    assert given == 6 * [dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="3")]

    always.unlink()  # mended: the same command does what is missing, and nothing else
    sweep.main(file, out=out)
    assert len((out / "attempts.jsonl").read_text().splitlines()) == 7
    assert "| random" in capsys.readouterr().out
    sweep.main(file, out=out)
    assert len((out / "attempts.jsonl").read_text().splitlines()) == 7
    assert "4 runs finished" in capsys.readouterr().out


def test_the_best_are_confirmed_on_fresh_seeds_alone(file, tmp_path, fake_trainer, capsys):
    edited(file, 'schedule = "increasing"', 'schedule = ["increasing", "decreasing", "placebo(fold)"]')
    out, confirmed = tmp_path / "out", tmp_path / "out-confirm"
    sweep.main(file, out=out, slots=2)
    capsys.readouterr()
    sweep.main(file, out=out, slots=2, confirm=("top=1", "seeds=2"), dry_run=True)
    assert not confirmed.exists()
    sweep.main(file, out=out, slots=2, confirm=("top=1", "seeds=2"))
    said = capsys.readouterr().out
    assert {path.name for path in confirmed.glob("*") if any(path.glob("order*-*"))} == {
        "random",
        "unigram_nll-decreasing-b4",  # the fake trainer's best
        "unigram_nll-placebo-decreasing-b4",
        "unigram_nll-reverse-decreasing-b4",
        "length-decreasing-b4",
    }
    assert {path.name for path in confirmed.glob("*/order*-*")} == {"order1000-seed1000", "order1001-seed1001"}
    table = said.rpartition("against random:")[2]
    assert "unigram_nll-decreasing-b4" in table and "unigram_nll-increasing-b4" not in table
    screen = {read_run(p).order_key for p in out.glob("*/order*-*")}
    assert screen.isdisjoint(read_run(p).order_key for p in confirmed.glob("*/order*-*"))
    with pytest.raises(InputError, match="was begun with top=1"):
        sweep.main(file, out=out, confirm=("top=2", "seeds=2"))


def test_two_sweeps_on_one_folder_are_refused(file, tmp_path, fake_trainer):
    with sweep.hold(tmp_path / "out"):
        with pytest.raises(InputError, match="another sweep is at work"):
            sweep.main(file, out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/order*"))


def test_a_run_still_held_by_a_process_of_before_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "ORPHAN_SECONDS", 0.3)
    log = tmp_path / "run.log"
    orphan = sweep.launch(["sleep", "1.2"], {}, log)  # holds the lock through its standard input, though we do not
    with pytest.raises(InputError, match="still at this run"):
        sweep.launch(["true"], {}, log)
    orphan.wait()
    assert sweep.launch(["true"], {}, log).wait() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_runs_die_with_a_killed_sweep(tmp_path):
    code = "import sys; from pathlib import Path; from scripts import sweep; "
    code += "process = sweep.launch(['sleep', '60'], {}, Path(sys.argv[1])); print(process.pid, flush=True); input()"
    line = [sys.executable, "-c", code, str(tmp_path / "run.log")]
    parent = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.communicate()
    assert sweep.launch(["true"], {}, tmp_path / "run.log").wait() == 0  # waits until the lock is free


def test_runs_of_another_config_are_refused_and_damaged_orders_made_again(file, tmp_path, fake_trainer):
    out = tmp_path / "out"
    sweep.main(file, out=out, slots=2)
    orders = {path: path.read_bytes() for path in (out / "orders").glob("*") if path.suffix != ".json"}
    assert len(orders) == 8  # a permutation and validation bins for each of four runs
    first = min(path for path in orders if not path.name.endswith(".val.npy"))
    first.write_bytes(first.read_bytes()[:-1])
    sweep.main(file, out=out)
    assert {path: path.read_bytes() for path in orders} == orders
    edited(file.parent / "base.toml", "batch_tokens = 256", "batch_tokens = 512")
    with pytest.raises(InputError, match="another configuration than the sweep asks for now"):
        sweep.main(file, out=out)


def test_slurm_gets_a_script_whose_tasks_are_the_missing_runs(file, tmp_path, fake_trainer, capsys):
    edited(file, "tokens = 2000", 'tokens = 2000\nslurm = ["--partition=gpu"]')
    out = tmp_path / "out"
    sweep.main(file, out=out, engine="slurm", gpus_per_run=0, slots=3, threads=2)
    script = (out / "slurm.sh").read_text()
    for option in ("--array=0-3%3", "--cpus-per-task=2", "--requeue", "--partition=gpu"):
        assert f"#SBATCH {option}\n" in script
    assert f"sbatch {out / 'slurm.sh'}" in capsys.readouterr().out and not list(out.glob("*/order*/metrics.jsonl"))

    (out / "random-order0-seed0").write_text("once")  # a task tries once more
    for task in (0, 2):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", str(out / "slurm.sh")], env=environment, check=True, timeout=60)
    done = {str(path.parent.relative_to(out)) for path in out.glob("*/order*/metrics.jsonl")}
    assert done == {"random/order0-seed0", "random/order1-seed1"}
    sweep.main(file, out=out, engine="slurm", gpus_per_run=2)
    script = (out / "slurm.sh").read_text()
    assert "#SBATCH --array=0-1\n" in script and "#SBATCH --gpus-per-node=2\n" in script
    assert script.count("-m torch.distributed.run --standalone --nproc_per_node=2") == 2


def test_gpus_are_pinned_in_groups(tmp_path):
    pool = sweep.Local(sweep.Machine("local", (4, 5, 6, 7), 2, 2, 8), tmp_path)
    assert list(pool.free) == ["4,5", "6,7"]


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed")
def test_ray_runs_them_too_and_retries(file, tmp_path, fake_trainer, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "random-order0-seed0").write_text("once")
    sweep.main(file, out=out, engine="ray", gpus_per_run=0, threads=1)
    assert len(list(out.glob("*/order*/metrics.jsonl"))) == 4
    assert len((out / "attempts.jsonl").read_text().splitlines()) == 5


def test_a_cluster_that_can_never_run_one_is_refused(tmp_path, monkeypatch):
    """With a Ray of two CPUs, which is none: starting one takes seconds."""
    ended = []
    ray = SimpleNamespace(
        init=lambda **_: None, cluster_resources=lambda: {"CPU": 2.0}, shutdown=lambda: ended.append(True)
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(InputError, match="a run asks Ray for num_gpus = 1, the cluster has 0"):
        sweep.Ray(sweep.Machine("ray", (), 1, 0, 4), tmp_path)
    assert ended == [True]


def test_a_board_in_a_terminal_shows_what_runs(file, tmp_path, fake_trainer):
    """Drawn into a string: a table of the running runs under the events."""
    from rich.console import Console
    from rich.live import Live

    folder = tmp_path / "arm" / "order0-seed0"
    folder.mkdir(parents=True)
    rows = [dict(kind="run"), dict(step=3, tokens=12_345, train_nats=4.5, tokens_per_second=777)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "tok')
    run = sweep.Run(Arm("arm", "nll", "fold", 4), Path(), Path(), 0, folder)
    board = sweep.Board(7, live=True)
    board.live = Live(console=Console(record=True, width=100, force_terminal=True), auto_refresh=False)
    with board:
        board.say("begun     arm/order0-seed0")
        board.done = 2
        board.show([run], waiting=3, failed=1)
    drawn = board.live.console.export_text()
    for part in ("begun", "2 of 7 runs finished, 1 running, 3 waiting, 1 failed", "12,345", "4.5000", "777"):
        assert part in drawn


def test_the_config_written_for_the_trainer_is_the_one_that_was_meant(file, tmp_path):
    cfg = load(read_sweep(file).config)
    (tmp_path / "written.toml").write_text(sweep.as_toml(cfg))
    assert load(tmp_path / "written.toml") == cfg
