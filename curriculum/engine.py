"""Many workers on one folder: who scores which unit, who else is alive, what failed.

A unit is done when its output is there, whoever wrote it, so workers need no messages between them: the same command
runs alone, under torchrun or srun (units strided over ranks, no process group, no collective), or as tasks of Ray.

Two locks make that safe. `.lock` is shared by all ranks of one launch and holds the launch's name: another launch is
refused while any of them lives. `.lock.<rank>` is held by one rank alone, and free as soon as its process has ended,
however it ended: that is how rank 0 knows whether to go on waiting for a rank's units. The kernel drops both with
the process; no lock is ever stale.

A unit that fails is tried again once, then recorded in its `error_file`; the others go on.
"""

import errno
import fcntl
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from data.cli import InputError
from data.files import read_json, write_json

ATTEMPTS = 2
START_SECONDS = 600  # how long to wait for a worker that has not shown up: nodes of a job may start minutes apart
POLL_SECONDS = 0.2
NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}


class Unit(Protocol):
    """A piece of work whose result is files."""

    name: str
    num_tokens: int
    error_file: Path

    @property
    def done(self) -> bool: ...


class Worker(Protocol):
    """Whatever scores units in one process: it holds the models."""

    settings: dict  # all that changes numbers: equal for all workers of a folder

    def score(self, unit: Unit, advance: Callable[[int], object]) -> None: ...


# ---------------------------------------------------------------- the launch


class Launch(NamedTuple):
    """The processes started together, and which of them this is."""

    id: str
    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on this machine: picks the GPU


def this_launch(environment=os.environ) -> Launch:
    """From the variables of torchrun or srun; without them a process is a launch of its own.

    A restart by torchrun or Slurm is another launch. Slurm's SLURM_NTASKS is not asked: it is set in a batch script
    too, where one process without srun is alone and must not wait for others.
    """

    def read(*names: str) -> list[int]:
        try:
            return [int(environment.get(name, 0)) for name in names]
        except ValueError:
            found = ", ".join(f"{name}={environment.get(name)}" for name in names)
            raise InputError(f"{found}: expected whole numbers, as torchrun and srun set them") from None

    host = socket.gethostname()
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world, local_rank = read("RANK", "WORLD_SIZE", "LOCAL_RANK")
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        # Ranks started by hand have none of these: then those of one shell belong together.
        launch = " ".join(environment[n] for n in names if n in environment) or f"{host} {os.getppid()}"
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        rank, world, local_rank = read("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        launch = "slurm " + " ".join(environment.get(n, "") for n in names)
    else:
        return Launch(f"{host} {os.getpid()} alone")
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} of {world}: expected 0..{world - 1}; check RANK and WORLD_SIZE")
    return Launch(f"{launch} of {world}", rank, world, local_rank)


@contextmanager
def hold_folder(out: Path, launch: Launch) -> Iterator[None]:
    """Hold the folder for this launch; refused (InputError) while another one, or the same rank twice, is at work.

    The name in `.lock` is written only by a process that holds the lock alone, and read by all while they share it:
    whoever shares it has read the same name. So ranks may come in any order, and of two launches one stays.
    """
    taken = InputError(f"{out}: another scorer is at work in this folder; wait for it or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+") as shared:
        try:
            fcntl.flock(shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # somebody is here: of our launch or of another
        else:
            sweep(out, launch)
            rewrite(shared, launch.id)
        fcntl.flock(shared, fcntl.LOCK_SH)
        shared.seek(0)
        if shared.read() != launch.id:
            raise taken
        with open(rank_lock(out, launch.rank), "a+") as own:
            try:
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise taken from None
            rewrite(own, launch.id)
            yield


def sweep(out: Path, launch: Launch) -> None:
    """Remove what ranks of earlier launches left. Ours stay: who came and went before us is gone, not late.

    Names may come again (torchrun calls every run "none" unless told otherwise), so old ones go whatever they say.
    """
    for path in out.glob(".lock.*"):
        if path.read_text() != launch.id or time.time() - path.stat().st_mtime > START_SECONDS:
            path.unlink()


def rank_lock(out: Path, rank: int) -> Path:
    return out / f".lock.{rank}"


def rewrite(file, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def state(out: Path, launch: Launch, rank: int) -> str:
    """absent (not started yet), alive or gone."""
    try:
        with open(rank_lock(out, rank)) as file:
            # A rank writes the name once it has its lock: before that, trying the lock could take it from the rank.
            if file.read() != launch.id:
                return "absent"
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return "gone"
    except FileNotFoundError:
        return "absent"
    except BlockingIOError:
        return "alive"


# ---------------------------------------------------------------- progress


class Progress:
    """A bar in tokens over the units of all workers, with tokens/s and time left; finished units are counted by file.

    Only this worker's unit in progress is known to the token; another's moves the bar when it is done.
    """

    def __init__(self, units: Sequence[Unit], show: bool):
        from tqdm import tqdm

        self.waiting = [u for u in units if not u.done]
        self.total = sum(u.num_tokens for u in units)
        self.in_unit, self.looked = 0, 0.0
        done = self.total - sum(u.num_tokens for u in self.waiting)
        self.bar = tqdm(
            total=self.total, initial=done, unit="tok", unit_scale=True, desc="scoring", disable=not show, mininterval=1
        )

    def begin(self) -> None:
        """A unit begins, perhaps again: what was counted of the last one is now counted by its file, or lost."""
        self.in_unit = 0

    def advance(self, tokens: int) -> None:
        self.in_unit += tokens
        self.look()

    def look(self, every_seconds: float = 1.0) -> None:
        """Count what is done, at most so often."""
        if self.bar.disable or time.monotonic() - self.looked < every_seconds:
            return
        self.looked = time.monotonic()
        self.waiting = [u for u in self.waiting if not u.done]
        done = self.total - sum(u.num_tokens for u in self.waiting) + self.in_unit
        self.bar.update(min(done, self.total) - self.bar.n)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.begin()
        self.look(0)
        self.bar.close()


# ---------------------------------------------------------------- ranks of one launch


class Ranks:
    """This process and its siblings under torchrun or srun, or this process alone. Rank 0 is the finaliser."""

    def __init__(self, out: Path, launch: Launch, open_worker: Callable[[int], Worker]):
        self.out, self.launch = out, launch
        self.worker = open_worker(launch.local_rank)

    def settings(self) -> dict:
        return self.worker.settings

    def score(self, units: Sequence[Unit]) -> dict[str, str]:
        """Score this rank's share; on rank 0 wait for the others' too. Returns {name of a lost unit: reason}."""
        share = units[self.launch.rank :: self.launch.world]
        for unit in share:
            unit.error_file.unlink(missing_ok=True)
        with Progress(units, show=self.launch.rank == 0) as progress:
            for unit in share:
                if not unit.done:
                    self.attempt(unit, progress)
            progress.begin()
            return self.wait(units, progress) if self.launch.rank == 0 else {}

    def attempt(self, unit: Unit, progress: Progress) -> None:
        for number in range(1, ATTEMPTS + 1):
            progress.begin()
            try:
                return self.worker.score(unit, progress.advance)
            except Exception as error:
                refuse_hopeless(unit, error)
                if number == ATTEMPTS:
                    record_failure(unit, error)

    def wait(self, units: Sequence[Unit], progress: Progress) -> dict[str, str]:
        """Until every unit is done or known to be lost."""
        launch, since = self.launch, time.monotonic()
        waiting, lost = dict(enumerate(units)), {}
        while True:
            # States first, files second: what a rank wrote, it wrote before it was gone.
            states = {rank: state(self.out, launch, rank) for rank in {number % launch.world for number in waiting}}
            states[launch.rank] = "gone"  # through with its share
            waiting = {number: unit for number, unit in waiting.items() if not unit.done}
            for number, unit in list(waiting.items()):
                rank = number % launch.world
                late = states[rank] == "absent" and time.monotonic() - since > START_SECONDS
                if states[rank] == "gone" or late:
                    ended = f"worker {rank} " + (f"did not start within {START_SECONDS} s" if late else "died")
                    lost[unit.name] = failure(unit) or ended
                    del waiting[number]
            progress.look()
            if not waiting:
                return lost
            time.sleep(POLL_SECONDS)


def refuse_hopeless(unit: Unit, error: Exception) -> None:
    """Raise what no second attempt can mend, as a sentence: bad input, a full disk."""
    if isinstance(error, InputError):
        raise error
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        raise InputError(
            f"unit {unit.name} could not be written: {NO_ROOM[error.errno]}. What is written is whole: make room and "
            "run the same command to continue"
        ) from None


def record_failure(unit: Unit, error: Exception) -> None:
    reason = f"{type(error).__name__}: {str(error).strip()}"
    write_json(
        unit.error_file,
        dict(unit=unit.name, error=reason, attempts=ATTEMPTS, traceback="".join(traceback.format_exception(error))),
    )
    print(f"unit {unit.name} failed {ATTEMPTS} times ({reason}); see {unit.error_file}", file=sys.stderr, flush=True)


def failure(unit: Unit) -> str | None:
    """Why a unit failed, if its worker lived to record it."""
    return read_json(unit.error_file).get("error") if unit.error_file.exists() else None


# ---------------------------------------------------------------- Ray


class RayWorkers:
    """Units as tasks of Ray actors, each with models of its own: on this machine, or on the cluster of RAY_ADDRESS.

    The folder, the shards and the reference must lie where every machine sees them under the same path. An actor
    that dies loses its unit in progress; another actor takes its place and the unit is scored again.
    """

    def __init__(self, open_worker: Callable[[int], Worker], num_workers: int, use_gpu: bool):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise InputError("--engine ray needs the extra: pip install 'entropy-curriculum[ray]'") from None

        self.ray = ray
        source = str(Path(__file__).parents[1])
        ray.init(logging_level="error", log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": source}})
        num_gpus = int(ray.cluster_resources().get("GPU", 0)) if use_gpu else 0
        if num_gpus and num_workers > num_gpus:
            raise InputError(f"--workers {num_workers}: Ray has {num_gpus} GPUs, and a worker fills one")
        cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        cpus = [count for count in cpus if count]
        # On CPU one worker fills a machine: its matrix products use all cores.
        num_workers = num_workers or num_gpus or len(cpus)
        cpu_share = min(cpus) / -(-num_workers // len(cpus))  # of a machine, for each of its workers
        share = {"num_gpus": 1} if num_gpus else {"num_cpus": int(cpu_share) if cpu_share >= 1 else cpu_share}
        self.actor_class = ray.remote(**share)(_RayWorker)
        self.open_worker = open_worker
        self.actors = [self.actor_class.remote(open_worker) for _ in range(num_workers)]

    def settings(self) -> dict:
        try:
            found = self.ray.get([actor.settings.remote() for actor in self.actors], timeout=START_SECONDS)
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            reason = cause if isinstance(cause, InputError) else str(error).strip().splitlines()[-1]
            raise InputError(f"a Ray worker could not start: {reason}") from None
        different = {key for other in found for key in found[0] if other.get(key) != found[0][key]}
        if different:
            raise InputError(f"Ray's machines differ in {', '.join(sorted(different))}: scores are never mixed")
        return found[0]

    def score(self, units: Sequence[Unit]) -> dict[str, str]:
        """Score what is missing. Returns {name of a lost unit: reason}."""
        settings = self.settings()
        for unit in units:
            unit.error_file.unlink(missing_ok=True)
        todo = [(unit, 1) for unit in reversed(units) if not unit.done]
        idle, tasks, lost = list(self.actors), {}, {}
        with Progress(units, show=True) as progress:
            while todo or tasks:
                while todo and idle:
                    (unit, number), actor = todo.pop(), idle.pop()
                    tasks[actor.score.remote(unit, settings)] = actor, unit, number
                for task in self.ray.wait(list(tasks), timeout=1.0)[0]:
                    actor, unit, number = tasks.pop(task)
                    try:
                        self.ray.get(task)
                    except self.ray.exceptions.RayError as error:
                        if isinstance(error, self.ray.exceptions.RayActorError):
                            actor = self.actor_class.remote(self.open_worker)
                        cause = getattr(error, "cause", None) or error
                        refuse_hopeless(unit, cause)
                        if number < ATTEMPTS:
                            todo.append((unit, number + 1))
                        else:
                            record_failure(unit, cause)
                            lost[unit.name] = failure(unit)
                    idle.append(actor)
                progress.look()
        return lost

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.ray.shutdown()


class _RayWorker:
    """One actor: opens the models once."""

    def __init__(self, open_worker: Callable[[int], Worker]):
        self.worker = open_worker(0)

    def settings(self) -> dict:
        return self.worker.settings

    def score(self, unit: Unit, settings: dict) -> None:
        if self.worker.settings != settings:
            raise InputError("a Ray worker was started again on a machine with another GPU or other libraries")
        self.worker.score(unit, lambda tokens: None)
