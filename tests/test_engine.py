"""Many workers on one folder: the same bytes however many there are, whoever dies, whatever fails."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from curriculum import engine, score
from curriculum.engine import Launch, Ranks, hold_folder, state, this_launch
from data.cli import InputError
from data.files import write_text

ROOT = Path(__file__).parents[1]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


def start(corpus, out, *options, rank=None, world=1, launch="one", unit_tokens=300) -> subprocess.Popen:
    """A scorer of text measures in a process of its own, as a rank of a launch or alone."""
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES and not k.startswith("SLURM_")}
    if rank is not None:
        environment |= dict(RANK=str(rank), WORLD_SIZE=str(world), TORCHELASTIC_RUN_ID=launch)
    line = [sys.executable, "-m", "curriculum.score", str(corpus), "--reference", "none", "--out", str(out)]
    line += ["--max-len", "64", "--unit-tokens", str(unit_tokens), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    """Exit code and all output of each."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        found.append((process.returncode, out + err))
    return found


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def alone(tiny_corpus, tmp_path_factory) -> dict[str, bytes]:
    """The tables of one undisturbed process."""
    out = tmp_path_factory.mktemp("alone") / "scores"
    score.main(str(tiny_corpus), "none", out, max_len=64, unit_tokens=300)
    return tables(out)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bytes(tiny_corpus, alone, tmp_path, world):
    """Rank 0 starts last: ranks may come in any order."""
    ranks = [start(tiny_corpus, tmp_path, rank=rank, world=world) for rank in reversed(range(world))]
    assert [code for code, _ in finish(*ranks)] == [0] * world
    assert tables(tmp_path) == alone
    assert not (tmp_path / "units").exists()


def test_killed_workers_continue_to_the_same_bytes(tiny_corpus, alone, tmp_path):
    """One of two ranks is killed at a random moment, three times; the other ends by itself, rank 0 with a sentence."""
    rng = random.Random(0)
    for launch in range(3):
        ranks = [start(tiny_corpus, tmp_path, rank=r, world=2, launch=f"l{launch}") for r in range(2)]
        victim = rng.randrange(2)
        while state(tmp_path, Launch(f"l{launch} of 2", 0, 2), victim) != "alive" and ranks[victim].poll() is None:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.6)
        ranks[victim].send_signal(signal.SIGKILL)
        for rank, (code, text) in enumerate(finish(*ranks)):
            assert code in ((-signal.SIGKILL, 0) if rank == victim else (0, 1)), text
            assert "Traceback" not in text
    assert finish(start(tiny_corpus, tmp_path))[0][0] == 0
    assert tables(tmp_path) == alone
    assert not (tmp_path / "units").exists()


def test_a_second_launch_is_refused_while_a_rank_of_the_first_lives(tiny_corpus, tmp_path):
    first = Launch("first of 2", rank=1, world=2)
    with hold_folder(tmp_path, first):
        for other in (start(tiny_corpus, tmp_path), start(tiny_corpus, tmp_path, rank=0, world=2, launch="second")):
            code, text = finish(other)[0]
            assert code == 2 and "another scorer" in text
        with pytest.raises(InputError, match="another scorer"), hold_folder(tmp_path, first):
            pass  # the same rank twice
        with hold_folder(tmp_path, first._replace(rank=0)):
            assert state(tmp_path, first, 0) == state(tmp_path, first, 1) == "alive"
        assert state(tmp_path, first, 0) == "gone"
        assert state(tmp_path, first, 2) == "absent"
    with hold_folder(tmp_path, Launch("second")):
        assert state(tmp_path, first, 1) == "absent"  # what an earlier launch left says nothing of this one


def test_launches_are_told_apart():
    assert this_launch({}).world == 1
    torchrun = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", TORCHELASTIC_RUN_ID="a")
    assert this_launch(torchrun)[1:] == (3, 4, 1)
    assert this_launch(torchrun).id == this_launch(torchrun | {"RANK": "0"}).id
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "WORLD_SIZE"):
        assert this_launch(torchrun | {name: "9"}).id != this_launch(torchrun).id
    srun = dict(SLURM_PROCID="3", SLURM_STEP_NUM_TASKS="4", SLURM_LOCALID="1", SLURM_JOB_ID="7", SLURM_STEP_ID="0")
    assert this_launch(srun)[1:] == (3, 4, 1)
    assert this_launch(srun | {"SLURM_STEP_ID": "1"}).id != this_launch(srun).id
    assert this_launch(dict(SLURM_PROCID="0", SLURM_NTASKS="8")).world == 1  # a batch script, without srun
    for wrong in (dict(RANK="4"), dict(RANK="-1"), dict(RANK="one"), dict(WORLD_SIZE="0", RANK="0")):
        with pytest.raises(InputError, match="RANK"):
            this_launch(torchrun | wrong)


def test_every_rank_of_a_machine_takes_another_gpu(monkeypatch):
    import torch

    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [score.own_device("auto", rank) for rank in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert chosen == [0, 3, 1]
    assert [score.own_device(name, 3) for name in ("cpu", "cuda:2")] == ["cpu", "cuda:2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun shows each rank its own
    assert score.own_device("auto", 3) == "auto"


class FakeUnit:
    def __init__(self, folder: Path, number: int):
        self.name, self.num_tokens = f"u{number}", 10
        self.file, self.error_file = folder / self.name, folder / f"{self.name}.error.json"

    @property
    def done(self) -> bool:
        return self.file.exists()


class FakeWorker:
    """Scores by writing; fails at a unit as often as it is told to."""

    settings: dict = {}

    def __init__(self, failures: dict[str, int] | None = None, error: Exception | None = None):
        self.failures, self.error, self.scored = failures or {}, error or RuntimeError("no luck"), []

    def score(self, unit, advance) -> None:
        if self.failures.get(unit.name, 0):
            self.failures[unit.name] -= 1
            raise self.error
        self.scored.append(unit.name)
        advance(unit.num_tokens)
        write_text(unit.file, unit.name)


def test_a_failing_unit_is_tried_again_then_recorded(tmp_path, capsys):
    units = [FakeUnit(tmp_path, i) for i in range(4)]
    worker = FakeWorker({"u1": 1, "u2": 2})
    ranks = Ranks(tmp_path, Launch("alone"), lambda local_rank: worker)
    assert ranks.score(units) == {"u2": "RuntimeError: no luck"}
    assert worker.scored == ["u0", "u1", "u3"]
    assert "u2 failed 2 times (RuntimeError: no luck)" in capsys.readouterr().err
    assert json.loads(units[2].error_file.read_text())["traceback"].count("no luck")
    assert ranks.score(units) == {}  # again: only what is missing, and nothing is held against it
    assert worker.scored == ["u0", "u1", "u3", "u2"] and not units[2].error_file.exists()


@pytest.mark.parametrize("error", [InputError("a shard changed"), OSError(28, "No space left on device")])
def test_what_cannot_be_mended_ends_the_worker(tmp_path, error):
    worker = FakeWorker({"u0": 1}, error)
    with pytest.raises(InputError, match="a shard changed|u0 could not be written: the disk is full"):
        Ranks(tmp_path, Launch("alone"), lambda local_rank: worker).score([FakeUnit(tmp_path, 0)])
    assert not list(tmp_path.glob("*.json"))


def test_the_finaliser_waits_for_the_living_and_not_for_the_dead(tmp_path, monkeypatch):
    first, second = (Launch("x", rank, 3) for rank in range(2))
    units = [FakeUnit(tmp_path, i) for i in range(6)]
    with hold_folder(tmp_path, second):
        Ranks(tmp_path, second, lambda local_rank: FakeWorker({"u4": 2})).score(units)
    monkeypatch.setattr(engine, "START_SECONDS", 0.1)
    with hold_folder(tmp_path, first):  # rank 1 is gone, rank 2 never came
        lost = Ranks(tmp_path, first, lambda local_rank: FakeWorker()).score(units)
    assert lost == {"u4": "RuntimeError: no luck"} | dict.fromkeys(["u2", "u5"], "worker 2 did not start within 0.1 s")
    monkeypatch.undo()
    for unit in (units[2], units[5]):
        write_text(unit.file, unit.name)
    units[1].file.unlink()
    with hold_folder(tmp_path, first):
        assert Ranks(tmp_path, first, lambda local_rank: FakeWorker()).score(units)["u1"] == "worker 1 died"


def test_lost_units_are_reported_and_the_rest_is_merged(tiny_corpus, alone, tmp_path, monkeypatch, capsys):
    whole = score.score_unit

    def breaks(unit, scorer, advance):
        if unit.name.startswith("tiny_train_000001.00002"):
            raise RuntimeError("CUDA error: something")
        return whole(unit, scorer, advance)

    monkeypatch.setattr(score, "score_unit", breaks)
    with pytest.raises(SystemExit) as stop:
        score.main(str(tiny_corpus), "none", tmp_path, max_len=64, unit_tokens=300)
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "not scored: tiny_train_000001.00002: RuntimeError: CUDA error" in printed.out
    assert "1 of " in printed.err and "the same command tries them again" in printed.err
    assert tables(tmp_path) == {n: alone[n] for n in ("tiny_train_000000.parquet", "tiny_val_000000.parquet")}
    with pytest.raises(InputError, match="not finished"):
        score.read_scores(tmp_path)
    monkeypatch.undo()
    score.main(str(tiny_corpus), "none", tmp_path, max_len=64, unit_tokens=300)
    assert tables(tmp_path) == alone and not (tmp_path / "units").exists()


def test_a_full_disk_is_a_sentence_and_nothing_is_half_written(tiny_corpus, alone, tmp_path):
    """A limit on the size of files stands in for the disk: the write fails in the middle just the same."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); "
        "from curriculum import score; from data.cli import command; command(score.main)"
    )
    line = [sys.executable, "-c", code, str(tiny_corpus), "--reference", "none", "--out", str(tmp_path)]
    line += ["--max-len", "64", "--unit-tokens", "300"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "too large" in done.stderr.lower()
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]
    score.main(str(tiny_corpus), "none", tmp_path, max_len=64, unit_tokens=300)
    assert tables(tmp_path) == alone


class Saboteur:
    """A worker that fails at one unit and dies at another, each the first time only."""

    def __init__(self, flags: Path, scorer: score.Scorer):
        self.flags, self.scorer, self.settings = flags, scorer, scorer.settings

    def first_time(self, what: str) -> bool:
        first = not (self.flags / what).exists()
        (self.flags / what).touch()
        return first

    def score(self, unit, advance) -> None:
        if unit.name.endswith("0.00003") and self.first_time("failed"):
            raise RuntimeError("no luck")
        if unit.name.endswith("0.00005") and self.first_time("died"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.scorer.score(unit, advance)


def open_saboteur(flags: Path, job, count_V, local_rank) -> Saboteur:
    return Saboteur(flags, score.open_scorer(job, count_V, local_rank))


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed")
def test_ray_gives_the_same_bytes_though_a_worker_fails_and_one_dies(tiny_corpus, alone, tmp_path, monkeypatch):
    flags, out = tmp_path / "flags", tmp_path / "scores"
    flags.mkdir()
    monkeypatch.setattr(score, "open_scorer", partial(open_saboteur, flags))
    score.main(str(tiny_corpus), "none", out, max_len=64, unit_tokens=300, engine="ray", workers=2)
    assert {path.name for path in flags.iterdir()} == {"failed", "died"}
    assert tables(out) == alone and not (out / "units").exists()


def test_ray_where_it_cannot_be_is_a_sentence(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="needs the extra"):
        score.main(str(tiny_corpus), "none", tmp_path, engine="ray")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="not torchrun"):
        score.main(str(tiny_corpus), "none", tmp_path, engine="ray")
