"""An ablation in one file: expand it, train what is missing, compare. The same command again continues it.

    python -m scripts.sweep configs/sweeps/first_answer.toml --dry-run     # what it costs, and what it can resolve
    python -m scripts.sweep configs/sweeps/first_answer.toml --slots 2     # two runs at a time on the CPU
    python -m scripts.sweep FILE --gpus 0 1 2 3                            # or four, each on a GPU of its own
    python -m scripts.sweep FILE --engine ray                              # or on a Ray cluster; slurm writes a script
    python -m scripts.sweep FILE --confirm top=3 seeds=8                   # the best, on seeds the screen never saw

The file names a base config, scores, seeds and grids. The axes of a grid are crossed, several grids are added up:

    config = "../demo.toml"              # relative to this file, as `extends` is
    scores = "runs/demo/scores"          # of the config's shards
    tokens = 196_608                     # of every order: an i.i.d. subset, the same for all arms; 0 is the corpus
    controls = ["placebo"]               # of every arm: placebo, length, reverse; `random` always runs
    seeds = { order = 3, random = 6 }    # order seeds of an arm, and of random; `init` runs for each of them

    [[grid]]
    measure = ["entropy", "nll - entropy"]
    schedule = ["increasing(sigma={sigma})", "fold({K})"]
    sigma = [0.05, 0.2]                  # {sigma} stands for the axis of that name
    K = [3, 5]
    bins = [4, 16]
    tail = [0, 0.2]                      # the last share of the run in random order: then(X, random, tau)
    "optim.cooldown_frac" = [0.4, 0.7]   # any setting of the trainer, [run] to [optim],
    "order.subset_seed" = [0, 1]         # and any option of curriculum.order

Arms are compared with a `random` of the same settings: each combination of the last two kinds has its own. Initial
weights are nested in orders: a run with another order seed has another init seed too, so that the spread between runs
holds both.

    runs/<file's name>/<arm>/order<k>-seed<s>/     a run, as train_gpt.py writes it
                      /orders, configs, logs       what it was given, and what it said
                      /attempts.jsonl              every attempt at a run: exit code and seconds
                      /report.html                 the leaderboard's report
    runs/<file's name>-confirm/                    the same for --confirm, and selected.json

A run is done when its last step was validated; that is asked of its folder, so nothing can be out of step. `.lock`
keeps two sweeps out of one folder, and a lock per run, held by the trainer itself, keeps two processes out of one run.
"""

import fcntl
import inspect
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from curriculum.config import Config, Table, load, validate
from curriculum.records import read_run
from curriculum.schedules import parse
from data.cli import InputError, command
from data.files import digest, read_json, write_json, write_text

ROOT = Path(__file__).parents[1]
TRAINER = (str(ROOT / "train_gpt.py"),)
ATTEMPTS = 2  # a crashed run is tried again once
FRESH = 1000  # order seeds of a confirmation begin here: a screen has fewer
POLL_SECONDS, REFRESH_SECONDS = 0.1, 1.0
ORPHAN_SECONDS = 30  # how long to wait for a process of an earlier sweep that was killed to be gone
SECTIONS = ("order", *Config.model_fields)
OURS = {  # what the sweep itself decides
    *("run.name", "run.seed", "run.num_seeds", "run.out_dir", "run.max_seconds", "data.order"),
    *(f"order.{key}" for key in ("scores", "out", "measure", "schedule", "bins", "seed", "config")),
}
NAME = 80  # characters of an arm's name


def main(
    file: Path,
    /,
    out: Path | None = None,
    dry_run: bool = False,
    confirm: tuple[str, ...] = (),
    engine: Literal["local", "ray", "slurm"] = "local",
    gpus: tuple[int, ...] = (),
    gpus_per_run: int = 1,
    slots: int = 0,
    threads: int = 0,
    tokens_per_second: float = 0.0,
    sd: float = 0.0,
) -> None:
    """Train every arm of a sweep on every seed, then print the leaderboard. Exit code 1 if a run failed.

    Args:
        file: the sweep (.toml).
        out: its folder; runs/<file's name> unless given.
        dry_run: stop after saying what would be done.
        confirm: top=K seeds=N: train the K best arms of the finished screen, their controls and random on N order
            seeds that the screen did not have, and compare these alone.
        engine: local processes, tasks of a Ray cluster (RAY_ADDRESS), or a Slurm array script to be submitted.
        gpus: local: the GPUs to use; none means the CPU.
        gpus_per_run: GPUs of one run (torchrun if several); ray and slurm: 0 means the CPU.
        slots: runs at a time: local, on the CPU (0 means one), or tasks of the Slurm array (0 means no limit).
        threads: CPU threads of a run; 0 means the cores shared out over the slots.
        tokens_per_second: of one run, for the estimate; measured once a run has finished.
        sd: spread of final losses between order seeds (nats), likewise.
    """
    sweep = read_sweep(file)
    out = out or Path("runs") / file.stem
    plan = Plan(out, sweep, expand(sweep), sweep.seeds, 0)
    if confirm:
        plan = confirmation(plan, *parse_confirm(confirm), remember=not dry_run)
    if tokens_per_second < 0 or sd < 0:
        raise InputError(f"--tokens-per-second {tokens_per_second:g}, --sd {sd:g}: expected 0 or more")
    machine = machine_for(engine, gpus, gpus_per_run, slots, threads)
    configs = trainer_configs(plan, file)
    sizes = check_orders(plan)
    tell(plan, file, machine, configs, sizes, tokens_per_second, sd)
    if dry_run:
        return
    with hold(plan.out):
        runs = prepare_runs(plan, configs)
        todo = [run for run in runs if final_loss(run.folder) is None]
        if engine == "slurm" and todo:
            script = write_slurm(plan.out, todo, machine, sweep.slurm)
            print(f"{script}: submit with  sbatch {script}")
            print(f"  then `python -m scripts.sweep {file}` again: it compares, or writes what is still missing")
            return
        failed = work_off(todo, machine, plan.out) if todo else {}
        compare(plan, runs)
    for name, reason in failed.items():
        print(f"failed {ATTEMPTS} times: {name}: {reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} runs failed; run the same command to try them again", file=sys.stderr)
        raise SystemExit(1)


# ----------------------------------------------------------------------------------------------------------------------
# The file


class Seeds(Table):
    order: Annotated[int, Field(ge=1, le=FRESH)] = 3
    """Order seeds of an arm: the n of its test."""
    init: Annotated[int, Field(ge=1)] = 1
    """Initial weights for each order seed."""
    random: Annotated[int, Field(ge=0, le=FRESH)] = 0
    """Order seeds of the baseline; 0 means as many as an arm. Every arm is compared with it: more are well spent."""

    def of(self, arm: "Arm") -> int:
        return max(self.order, self.random) if arm.kind == "random" else self.order


Control = Literal["placebo", "length", "reverse"]


class Sweep(Table):
    config: str
    """Base config of the trainer, relative to the sweep's file."""
    scores: str
    """Score tables of the config's shards."""
    tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of an order: an i.i.d. subset of the scored corpus; 0 means all of it."""
    seeds: Seeds = Seeds()
    controls: Annotated[tuple[Control, ...], Field(strict=False)] = ()
    """Controls of every arm."""
    confirm_controls: Annotated[tuple[Control, ...], Field(strict=False)] = ("placebo", "length", "reverse")
    """Controls of the arms that are confirmed."""
    slurm: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """More #SBATCH options of the array script, e.g. "--partition=gpu"."""
    grid: Annotated[tuple[dict[str, Any], ...], Field(strict=False, min_length=1)]
    """Axes by name; each a list of values, or one value."""


def read_sweep(path: Path) -> Sweep:
    """`config` is returned as a path from here. Raises InputError naming the setting, what was got and is known."""
    if not path.is_file():
        raise InputError(f"{path}: no such sweep; those of the project are in configs/sweeps")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    try:
        sweep = Sweep.model_validate(tables)
    except ValidationError as errors:
        raise InputError(f"{path}: {'; '.join(explain(error) for error in errors.errors())}") from None
    return sweep.model_copy(update=dict(config=str(path.parent / sweep.config)))


def explain(error: Mapping) -> str:
    """One of pydantic's complaints as a phrase."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = Seeds if error["loc"][0] == "seeds" else Sweep
        return f"unknown setting {where}; known are {', '.join(known.model_fields)}"
    if error["type"] == "missing":
        return f"{where} is missing"
    return f"{where} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


# ----------------------------------------------------------------------------------------------------------------------
# Arms


class Arm(NamedTuple):
    """One line of the leaderboard."""

    name: str
    measure: str
    schedule: str  # as written in the file; what it means is `parse(schedule).text`
    bins: int
    settings: tuple[tuple[str, Any], ...] = ()  # of trainer and order, apart from the base: arms of equal ones compare
    kind: str = "arm"  # or random, placebo, length, reverse

    @property
    def recipe(self) -> tuple:
        """Arms of one recipe are one arm."""
        return self.measure, parse(self.schedule).text, self.bins, repr(self.settings)


def expand(sweep: Sweep) -> list[Arm]:
    """All arms, each once: of every setting random first, then arms, each followed by its controls.

    Raises InputError on an unknown axis, a value of the wrong type, and an expression that does not parse.
    """
    arms = {arm.recipe: arm for grid in sweep.grid for arm in arms_of(grid)}
    return with_controls(list(arms.values()), sweep.controls)


def arms_of(grid: Mapping[str, Any]) -> Iterator[Arm]:
    """The arms of one grid; those that do not depend on an axis come more than once."""
    axes = {name: values if isinstance(values, list) else [values] for name, values in grid.items()}
    for name, values in axes.items():
        check_axis(name, values, axes)
    axes = {"bins": [16], "tail": [0]} | axes
    for point in itertools.product(*axes.values()):
        value = dict(zip(axes, point, strict=True))
        measure, schedule = (fill(value[name], value) for name in ("measure", "schedule"))
        if value["tail"]:
            schedule = f"then({schedule}, random, tau={value['tail']})"
        if parse(schedule).text == "random":
            raise InputError("grid: schedule random: it is the baseline and always runs; take it out")
        settings = tuple((name, frozen(value[name])) for name in sorted(value) if "." in name)
        yield named(Arm("", measure, schedule, value["bins"], settings))


def frozen(value: Any) -> Any:
    """A list as a tuple, so that what has it can be a key."""
    return tuple(frozen(item) for item in value) if isinstance(value, list) else value


def check_axis(name: str, values: list, axes: Mapping[str, list]) -> None:
    """Raises InputError unless the axis is known and its values have its type."""
    for missing in {"measure", "schedule"} - axes.keys():
        raise InputError(f"grid: {missing} is missing; give it a value or a list of them")
    if not values:
        raise InputError(f"grid: {name} = []: expected at least one value")
    texts = [text for key in ("measure", "schedule") for text in axes[key] if isinstance(text, str)]
    expected = {
        "measure": ("a column or an expression over columns", lambda v: isinstance(v, str)),
        "schedule": ("a schedule such as increasing or fold(5)", lambda v: isinstance(v, str)),
        "bins": ("a whole number from 1 to 1024", lambda v: type(v) is int and 1 <= v <= 1024),
        "tail": ("a share from 0 to 1, below 1", lambda v: type(v) in (int, float) and 0 <= v < 1),
    }
    if name in expected:
        what, fits = expected[name]
        for value in values:
            if not fits(value):
                raise InputError(f"grid: {name} = {value!r}: expected {what}")
    elif name in OURS:
        raise InputError(f"grid: {name} is set by the sweep; it cannot be an axis")
    elif name.partition(".")[0] not in SECTIONS if "." in name else not any(f"{{{name}}}" in text for text in texts):
        raise InputError(
            f"grid: unknown axis {name}; known are {', '.join(expected)}, settings such as optim.cooldown_frac or "
            f"order.subset_seed, and names that a measure or schedule has in braces, as fold({{{name}}})"
        )


def fill(text: str, value: Mapping[str, Any]) -> str:
    """
    >>> fill("fold({K}, sigma={sigma})", {"K": 3, "sigma": 0.05})
    'fold(3, sigma=0.05)'
    """

    def axis(match: re.Match) -> str:
        if match[1] not in value:
            raise InputError(f"grid: {text}: there is no axis {match[1]}; known are {', '.join(value)}")
        return str(value[match[1]])

    return re.sub(r"{(\w+)}", axis, text)


def with_controls(arms: Sequence[Arm], controls: Sequence[Control]) -> list[Arm]:
    """The arms, random for each of their settings, and the controls asked for; a control that is an arm is that."""
    found: dict[tuple, Arm] = {}
    by_settings = sorted(arms, key=lambda arm: [a.settings for a in arms].index(arm.settings))
    proper = {arm.recipe for arm in arms}
    for arm in by_settings:
        made = [named(arm._replace(schedule="random", measure=arms[0].measure, bins=arms[0].bins, kind="random")), arm]
        made += [named(control_of(arm, kind)) for kind in controls]
        for one in made:
            if one.kind in ("arm", "random") or one.recipe not in proper:
                found.setdefault(one.recipe, one)
    names = Counter(arm.name for arm in found.values())
    for name, count in names.items():
        if count > 1:
            raise InputError(f"grid: {count} arms would be called {name}; write their schedules differently")
    return list(found.values())


def control_of(arm: Arm, kind: Control) -> Arm:
    match kind:
        case "length":
            return arm._replace(measure="length", kind=kind)
        case "placebo" | "reverse":
            return arm._replace(schedule=f"{kind}({arm.schedule})", kind=kind)


def named(arm: Arm) -> Arm:
    """The arm with a name made of what it is, fit for a folder and for run.name.

    >>> named(Arm("", "nll", "tilt(0, -2)", 16)).name, named(Arm("", "nll", "random", 16, (), "random")).name
    ('nll-tilt-0-m2-b16', 'random')
    """
    signs = re.sub(r"(?<![\w.)])-(?=[\d.])", "m", arm.schedule)
    parts = ["random"] if arm.kind == "random" else [arm.measure, signs, f"b{arm.bins}"]
    parts += [f"{name.rpartition('.')[2]}-{value}" for name, value in arm.settings]
    name = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts)
    if len(name) > NAME or not re.fullmatch(r"\w+", arm.measure) or any(isinstance(v, tuple) for _, v in arm.settings):
        name = f"{name[:NAME]}-{digest(arm.recipe, 6)}"  # what is left of an expression may be that of another
    return arm._replace(name=name)


# ----------------------------------------------------------------------------------------------------------------------
# Runs: what trains an arm on a seed


class Plan(NamedTuple):
    out: Path
    sweep: Sweep
    arms: list[Arm]
    seeds: Seeds
    first_seed: int  # of the order seeds

    def pairs(self) -> Iterator[tuple[Arm, int, int]]:
        """Arm, order seed, init seed of every run. All arms get a seed before any gets the next."""
        most = max(self.seeds.of(arm) for arm in self.arms)
        for k, r in itertools.product(range(most), range(self.seeds.init)):
            for arm in self.arms:
                if k < self.seeds.of(arm):
                    yield arm, self.first_seed + k, (self.first_seed + k) * self.seeds.init + r


class Run(NamedTuple):
    arm: Arm
    order: Path
    config: Path
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm.name}/{self.folder.name}"

    def command(self, gpus: int) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
        options = {
            "data.order": self.order,
            "run.name": self.arm.name,
            "run.seed": self.seed,
            "run.out_dir": self.folder,
        }
        flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        return [sys.executable, *torchrun, *TRAINER, str(self.config), *flags]


def trainer_configs(plan: Plan, file: Path) -> dict[tuple, Config]:
    """The trainer's config for every combination of settings. Raises InputError on what the trainer would refuse."""
    base = load(plan.sweep.config)
    if base.data.order or base.run.num_seeds != 1 or base.run.max_seconds:
        raise InputError(f"{plan.sweep.config}: data.order, run.num_seeds and run.max_seconds are the sweep's to set")
    configs = {}
    for settings in {arm.settings: None for arm in plan.arms}:
        tables = base.model_dump()
        for name, value in settings:
            section, _, key = name.partition(".")
            if section != "order":
                tables[section][key] = value
        configs[settings] = validate(tables, str(file))
    return configs


def order_options(plan: Plan, arm: Arm) -> dict[str, Any]:
    """What curriculum.order is asked for, seed and file apart."""
    options = dict(measure=arm.measure, schedule=parse(arm.schedule).text, bins=arm.bins, tokens=plan.sweep.tokens)
    return options | {name[6:]: value for name, value in arm.settings if name.startswith("order.")}


def check_orders(plan: Plan) -> dict[str, int]:
    """Tokens of an order by arm. Raises InputError if the scores are missing, or a measure or an option is unknown."""
    from curriculum import order
    from curriculum.measures import evaluate
    from curriculum.score import read_scores

    table = read_scores(plan.sweep.scores)
    known = [key for key in inspect.signature(order.main).parameters if f"order.{key}" not in OURS]
    for part in {part for arm in plan.arms for part in order.measures_of(arm.measure)}:
        evaluate(part, table.columns)
    sizes = {}
    for arm in plan.arms:
        options = order_options(plan, arm)
        for key in options.keys() - {"measure", "schedule", "bins", *known}:
            raise InputError(f"grid: curriculum.order has no option {key}; known are order.{', order.'.join(known)}")
        sizes[arm.name] = options["tokens"] or options.get("epochs", 1) * table.segments.num_tokens
    return sizes


def prepare_runs(plan: Plan, configs: Mapping[tuple, Config]) -> list[Run]:
    """Write configs and orders where they are missing. Raises InputError if a run's folder holds another run."""
    from curriculum import order, runs
    from curriculum.score import read_scores

    scores_id = read_scores(plan.sweep.scores).id
    config_paths = {}
    for settings, cfg in configs.items():
        path = config_paths[settings] = plan.out / "configs" / f"{digest(repr(settings), 8)}.toml"
        write_text(path, as_toml(cfg))
    logs = plan.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    found, checked = [], set()
    with open(logs / "orders.log", "a", encoding="utf-8") as log, redirect_stdout(log):
        for arm, order_seed, init_seed in plan.pairs():
            options = order_options(plan, arm) | dict(seed=order_seed)
            path = plan.out / "orders" / f"{arm.name}-{order_seed}-{digest([scores_id, options], 8)}.npy"
            ensure_order(path, Path(plan.sweep.scores), config_paths[arm.settings], options)
            folder = plan.out / arm.name / f"order{order_seed}-seed{init_seed}"
            run = Run(arm, path, config_paths[arm.settings], init_seed, folder)
            cfg = configs[arm.settings]
            table = dict(data=cfg.data.model_copy(update=dict(order=str(path))))
            if arm.settings not in checked:  # what the trainer would refuse of every run, said before the first
                checked.add(arm.settings)
                runs.prepare(cfg.model_copy(update=table), print)
            check_folder(run, cfg, order.load_order(path).manifest["order_sha256"])
            found.append(run)
    return found


def ensure_order(path: Path, scores: Path, config: Path, options: Mapping[str, Any]) -> None:
    """The order at `path`, made unless it is there and whole. All that it depends on is in its name."""
    from curriculum import order

    try:
        order.load_order(path)
    except InputError:
        for part in path.parent.glob(f"{path.stem}.*"):
            part.unlink()
        order.main(scores=scores, out=path, config=config, **options)


def check_folder(run: Run, cfg: Config, order_sha256: str) -> None:
    """Raises InputError if there is another run: of an earlier version of the sweep, its config or its scores."""
    known = run.folder / "config.json"
    if known.exists():
        stored = read_json(known)
        mine = [run.seed, order_sha256, cfg.digest()]
        theirs = [stored["identity"].get("seed"), stored["identity"].get("order_sha256")]
        theirs.append(validate(stored["config"], str(known)).digest())
        for what, a, b in zip(("seed", "order", "configuration"), mine, theirs, strict=True):
            if a != b:
                raise InputError(
                    f"{run.folder}: holds a run with another {what} than the sweep asks for now; remove it, or choose "
                    "another --out"
                )


def as_toml(cfg: Config) -> str:
    """
    >>> print(as_toml(Config())[:18])
    [run]
    name = "run"
    """
    tables = cfg.model_dump(mode="json")
    lines = [
        [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in t.items()), ""] for name, t in tables.items()
    ]
    return "\n".join(itertools.chain(*lines))


def final_loss(folder: Path) -> float | None:
    """Validation loss at the end of the run there; None if it has not got there."""
    try:
        return read_run(folder).final_val_nats
    except InputError:  # none there, or one that was killed before its first row was whole
        return None


# ----------------------------------------------------------------------------------------------------------------------
# What it costs, and what it can resolve


class Machine(NamedTuple):
    engine: str
    gpus: tuple[int, ...]
    gpus_per_run: int
    slots: int
    threads: int

    def about(self) -> str:
        of = (
            f"{self.gpus_per_run} GPU{'s' * (self.gpus_per_run > 1)}"
            if self.gpus_per_run
            else f"{self.threads} CPU threads"
        )
        return f"{self.slots} at a time, {of} each" if self.engine == "local" else f"{self.engine}, {of} a run"


def machine_for(engine: str, gpus: tuple[int, ...], gpus_per_run: int, slots: int, threads: int) -> Machine:
    """From the options of a command line. Raises InputError on what cannot be."""
    given = f"--gpus {' '.join(map(str, gpus))}"
    if min(gpus_per_run, slots, threads) < 0:
        raise InputError(f"--gpus-per-run {gpus_per_run}, --slots {slots}, --threads {threads}: expected 0 or more")
    if gpus and (not gpus_per_run or len(gpus) % gpus_per_run):
        raise InputError(f"{given}: their number is not a multiple of --gpus-per-run {gpus_per_run}")
    if len(set(gpus)) < len(gpus):
        raise InputError(f"{given}: each GPU once")
    if engine == "local":
        gpus_per_run = gpus_per_run if gpus else 0
        slots = len(gpus) // gpus_per_run if gpus else max(1, slots)
    shared_by = slots if engine == "local" else 1
    return Machine(engine, gpus, gpus_per_run, slots, threads or max(1, (os.cpu_count() or 1) // shared_by))


def tell(plan, file, machine, configs, sizes, tokens_per_second: float, sd: float) -> None:
    """Print arms, runs, tokens, time, and the smallest effect, all before anything starts."""
    losses: dict[Arm, dict[int, list]] = {}  # of the arm's runs, by order seed; None where one is not finished
    todo_tokens, tokens = 0, 0
    for arm, order_seed, init_seed in plan.pairs():
        cfg = configs[arm.settings]
        planned = min(sizes[arm.name], cfg.run.steps * cfg.data.batch_tokens or sizes[arm.name])
        loss = final_loss(plan.out / arm.name / f"order{order_seed}-seed{init_seed}")
        losses.setdefault(arm, {}).setdefault(order_seed, []).append(loss)
        tokens += planned
        todo_tokens += planned if loss is None else 0
    width, runs, finished = max(len(arm.name) for arm in plan.arms), 0, 0
    for arm, by_seed in losses.items():
        of = sum(len(group) for group in by_seed.values())
        done = of - sum(group.count(None) for group in by_seed.values())
        runs, finished = runs + of, finished + done
        print(f"  {arm.name:{width}}  {done}/{of} runs  {about(arm)}")
    print(f"{file}: {len(plan.arms)} arms, {runs} runs, {tokens:,} tokens; {finished} runs finished; in {plan.out}")
    if todo_tokens:
        print(f"  {how_long(todo_tokens, machine, measured_rate(plan.out), tokens_per_second)}")
    for settings in configs:
        print(f"  {smallest(plan, losses, settings, sd)}")


def about(arm: Arm) -> str:
    if arm.kind == "random":
        return ", ".join(["the baseline", *(f"{name} {value}" for name, value in arm.settings)])
    settings = "".join(f", {name} {value}" for name, value in arm.settings)
    return f"{arm.schedule} over {arm.bins} bins of {arm.measure}{settings}" + f" ({arm.kind})" * (arm.kind != "arm")


def how_long(tokens: int, machine: Machine, measured: float | None, given: float) -> str:
    if not (rate := measured or given):
        return f"time to go: known when a run has finished, or from --tokens-per-second ({machine.about()})"
    source = "measured on finished runs, start and validation included" if measured else "as given"
    time_left = clock(tokens / rate / max(1, machine.slots))
    return f"{time_left} to go ({machine.about()}, {rate:,.0f} tokens/s a run, {source})"


def smallest(plan: Plan, losses: Mapping[Arm, dict[int, list]], settings: tuple, sd: float) -> str:
    """The smallest improvement that arms of these settings can show with 80 % power."""
    from curriculum.compare import smallest_effect

    arms = [arm for arm in plan.arms if arm.settings == settings]
    base = next(arm for arm in arms if arm.kind == "random")
    n_arm, n_base, comparisons = plan.seeds.order, plan.seeds.of(base), len(arms) - 1
    where = f"{base.name}: " if settings else ""
    in_sd = smallest_effect(1.0, n_arm, n_base, comparisons=comparisons)
    if math.isinf(in_sd):
        return f"{where}one order seed an arm: no test is possible, only a ranking"
    means = [statistics.fmean(group) for group in losses[base].values() if None not in group]
    basis = f"{n_arm} against {n_base} order seeds, {comparisons} arms under Holm"
    if len(means) > 1:
        sd, source = statistics.stdev(means), f"of {len(means)} order seeds of random"
    elif sd:
        source = "as given"
    else:
        return f"{where}resolves {in_sd:.2f} times the sd between order seeds at 80 % power ({basis}); --sd gives nats"
    return f"{where}resolves {in_sd * sd:.4f} nats at 80 % power (sd {sd:.4f} {source}; {basis})"


def clock(seconds: float) -> str:
    """
    >>> clock(40), clock(3000), clock(30000)
    ('40 s', '50 min', '8.3 h')
    """
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def measured_rate(out: Path) -> float | None:
    """Tokens/s of a run from its start to its end, as a median of those that ran in one go."""
    try:
        lines = (out / "attempts.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return None
    rows = [json.loads(line) for line in lines]
    rates = [row["tokens"] / row["seconds"] for row in rows if row["exit"] == 0 and row["whole"]]
    return statistics.median(rates) if rates else None


# ----------------------------------------------------------------------------------------------------------------------
# Processes


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """One sweep at a time in a folder (InputError). The kernel drops the lock with the process: it is never stale."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{out}: another sweep is at work in this folder; wait for it or choose another --out"
            ) from None
        yield


def launch(line: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen:
    """Start a trainer. Its standard input is a lock on its run, which it and all its children hold while they live.

    On Linux it dies with us; elsewhere, and where it has children, the lock tells that it is still there.
    """
    lock, since = open(log.with_suffix(".lock"), "w"), time.monotonic()
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - since > ORPHAN_SECONDS:
                    raise InputError(
                        f"{log.stem}: a process of an earlier sweep is still at this run; end it"
                    ) from None
                time.sleep(POLL_SECONDS)
        with open(log, "a", encoding="utf-8") as said:
            env = {**os.environ, **environment}
            return subprocess.Popen(
                line, cwd=Path.cwd(), env=env, stdin=lock, stdout=said, stderr=said, preexec_fn=die_with_parent
            )


def die_with_parent() -> None:
    """In the new process, before the trainer is loaded: a killed sweep must not leave its runs behind."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def log_of(out: Path, run: Run) -> Path:
    return out / "logs" / f"{run.arm.name}-{run.folder.name}.log"


class Local:
    """Processes of this machine, one in each slot. Started and waited for by one thread: a child dies with that."""

    def __init__(self, machine: Machine, out: Path):
        self.machine, self.out = machine, out
        per_run = machine.gpus_per_run
        gpus = [",".join(map(str, machine.gpus[i : i + per_run])) for i in range(0, len(machine.gpus), per_run or 1)]
        self.free = deque(gpus or [""] * machine.slots)
        self.running: dict[Run, tuple[subprocess.Popen, str]] = {}

    def has_room(self) -> bool:
        return bool(self.free)

    def start(self, run: Run) -> None:
        gpus = self.free.popleft()
        environment = {"CUDA_VISIBLE_DEVICES": gpus, "OMP_NUM_THREADS": str(self.machine.threads)}
        process = launch(run.command(self.machine.gpus_per_run), environment, log_of(self.out, run))
        self.running[run] = process, gpus

    def ended(self) -> list[tuple[Run, int]]:
        time.sleep(POLL_SECONDS)
        found = [(run, process.poll()) for run, (process, _) in self.running.items() if process.poll() is not None]
        for run, _ in found:
            self.free.append(self.running.pop(run)[1])
        return found

    def close(self) -> None:
        for process, _ in self.running.values():
            process.terminate()
        for process, _ in self.running.values():
            process.wait()


class Ray:
    """Runs as tasks, on this machine or on the cluster of RAY_ADDRESS, which sees the folder under the same path."""

    def __init__(self, machine: Machine, out: Path):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise InputError("--engine ray needs the extra: pip install 'entropy-curriculum[ray]'") from None
        self.ray, self.machine, self.out = ray, machine, out
        environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        ray.init(logging_level="error", log_to_driver=False, runtime_env=environment)
        share = dict(num_gpus=machine.gpus_per_run) if machine.gpus_per_run else dict(num_cpus=machine.threads)
        for resource, wanted in share.items():
            held = ray.cluster_resources().get(resource[4:-1].upper(), 0)
            if held < wanted:
                ray.shutdown()
                raise InputError(
                    f"a run asks Ray for {resource} = {wanted}, the cluster has {held:g}; see --gpus-per-run, --threads"
                )
        self.task = ray.remote(max_retries=0, **share)(run_to_end)
        self.running: dict[Run, Any] = {}
        self.capacity = max(1, int(held // wanted))

    def has_room(self) -> bool:
        return len(self.running) < self.capacity

    def start(self, run: Run) -> None:
        environment = {"OMP_NUM_THREADS": str(self.machine.threads)}
        if not self.machine.gpus_per_run:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        line = run.command(self.machine.gpus_per_run)
        self.running[run] = self.task.remote(line, environment, log_of(self.out, run).resolve(), Path.cwd())

    def ended(self) -> list[tuple[Run, int]]:
        ready = self.ray.wait(list(self.running.values()), timeout=REFRESH_SECONDS)[0]
        found = []
        for run, task in list(self.running.items()):
            if task in ready:
                del self.running[run]
                try:
                    found.append((run, self.ray.get(task)))
                except self.ray.exceptions.RayError as error:  # its machine is gone
                    with open(log_of(self.out, run), "a", encoding="utf-8") as log:
                        log.write(f"ray: {str(error).strip().splitlines()[-1]}\n")
                    found.append((run, -1))
        return found

    def close(self) -> None:
        for task in self.running.values():
            self.ray.cancel(task, force=True)
        self.ray.shutdown()


def run_to_end(line: list[str], environment: dict[str, str], log: Path, folder: Path) -> int:
    os.chdir(folder)
    return launch(line, environment, log).wait()


def work_off(todo: Sequence[Run], machine: Machine, out: Path) -> dict[str, str]:
    """Train all runs, each at most ATTEMPTS times. Returns {name of a run that failed: why}."""
    waiting, attempts, failed = deque(todo), Counter(), {}
    begun: dict[Run, tuple[float, bool]] = {}
    pool = {"local": Local, "ray": Ray}[machine.engine](machine, out)
    with Board(len(todo), sys.stdout.isatty()) as board:
        try:
            while waiting or pool.running:
                while waiting and pool.has_room():
                    run = waiting.popleft()
                    attempts[run] += 1
                    begun[run] = time.time(), not run.folder.exists()
                    pool.start(run)
                    board.say(f"begun     {run.name}" + (" again" if attempts[run] > 1 else ""))
                for run, code in pool.ended():
                    (since, whole), loss = begun.pop(run), final_loss(run.folder)
                    code = code or (0 if loss is not None else -1)  # ended well, but before its end
                    seconds = time.time() - since
                    note_attempt(out, run, code, seconds, whole)
                    if code == 0:
                        board.done += 1
                        board.say(f"finished  {run.name}  {loss:.4f} nats  {clock(seconds)}")
                    elif attempts[run] < ATTEMPTS:
                        board.say(f"crashed   {run.name}: {why(out, run, code)}; once more")
                        waiting.append(run)
                    else:
                        failed[run.name] = why(out, run, code)
                        board.say(f"failed    {run.name}: {failed[run.name]}")
                board.show(pool.running, len(waiting), len(failed))
        finally:
            pool.close()
    return failed


def note_attempt(out: Path, run: Run, code: int, seconds: float, whole: bool) -> None:
    about = dict(run=run.name, exit=code, seconds=round(seconds, 3), whole=whole, tokens=last_row(run).get("tokens", 0))
    with open(out / "attempts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(about) + "\n")


def why(out: Path, run: Run, code: int) -> str:
    """The last thing that a run said, and how it ended."""
    log = log_of(out, run)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ended = signal.Signals(-code).name if code < -1 else f"exit code {code}"
    return f"{ended}, {lines[-1].strip()[:300]!r} (all of it in {log})" if lines else f"{ended}, nothing said"


def last_row(run: Run) -> dict:
    """The newest whole row of a run in progress."""
    try:
        with open(run.folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 17)))
            for line in reversed(file.read().split(b"\n")[:-1]):
                if line.startswith(b'{"step"'):
                    return json.loads(line)
    except OSError:
        pass
    return {}


class Board:
    """What is going on: a table that is redrawn in a terminal, a line for every event elsewhere."""

    def __init__(self, total: int, live: bool):
        self.total, self.done, self.since, self.drawn, self.live = total, 0, time.time(), 0.0, None
        if live:
            from rich.live import Live

            # It draws when told to: a thread of its own would be the parent that runs die with.
            self.live = Live(auto_refresh=False, transient=True)

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def say(self, event: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}  {event}"
        if self.live:
            self.live.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def show(self, running: Sequence[Run], waiting: int, failed: int) -> None:
        if not self.live or time.time() - self.drawn < REFRESH_SECONDS:
            return
        from rich.console import Group
        from rich.table import Table as Grid

        self.drawn = time.time()
        passed = self.drawn - self.since
        left = f", about {clock(passed / self.done * (self.total - self.done))} to go" if self.done else ""
        counts = (
            f"{self.done} of {self.total} runs finished, {len(running)} running, {waiting} waiting, {failed} failed"
        )
        table = Grid()
        for column in ("run", "tokens", "loss", "tokens/s"):
            table.add_column(column, justify="left" if column == "run" else "right")
        for run in running:
            row = last_row(run)
            loss = row.get("train_nats", row.get("val_nats"))
            speed = row.get("tokens_per_second")
            cells = (f"{row.get('tokens', 0):,}", f"{loss:.4f}" if loss else "", f"{speed:,}" if speed else "")
            table.add_row(run.name, *cells)
        self.live.update(Group(f"{counts}; {clock(passed)} so far{left}", table), refresh=True)


def write_slurm(out: Path, todo: Sequence[Run], machine: Machine, options: Sequence[str]) -> Path:
    """An array script whose task i trains the i-th missing run, tries once more if it crashes, and may be requeued."""
    lines = [shlex.join(run.command(machine.gpus_per_run)) for run in todo]
    logs = [shlex.quote(str(log_of(out, run).resolve())) for run in todo]
    limit = f"%{machine.slots}" if machine.slots else ""
    gpus = f"#SBATCH --gpus-per-node={machine.gpus_per_run}\n" if machine.gpus_per_run else ""
    extra = "".join(f"#SBATCH {option}\n" for option in options)
    cases = "".join(
        f"{i}) log={log}; run() {{ {line}; }} ;;\n" for i, (line, log) in enumerate(zip(lines, logs, strict=True))
    )
    script = out / "slurm.sh"
    write_text(
        script,
        f"""#!/usr/bin/env bash
#SBATCH --job-name={out.name}
#SBATCH --array=0-{len(todo) - 1}{limit}
#SBATCH --cpus-per-task={machine.threads}
#SBATCH --output={(out / "logs").resolve()}/slurm-%A_%a.log
#SBATCH --requeue
{gpus}{extra}# Written by scripts/sweep.py: one task for each run that was missing. A run continues where it was.
cd {shlex.quote(str(Path.cwd()))} || exit 1
export OMP_NUM_THREADS={machine.threads}
case "$SLURM_ARRAY_TASK_ID" in
{cases}*) echo "no task $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
exec 9> "${{log%.log}}.lock"
flock -n 9 || {{ echo "another process is at this run" >&2; exit 1; }}
run >> "$log" 2>&1 || run >> "$log" 2>&1
""",
    )
    return script


# ----------------------------------------------------------------------------------------------------------------------
# Comparing, and confirming


def compare(plan: Plan, runs: Sequence[Run]) -> None:
    """The leaderboard of each combination of settings, against its own random, and where its report is."""
    from scripts import leaderboard

    bases = [arm for arm in plan.arms if arm.kind == "random"]
    for base in bases:
        arms = {run.arm.name for run in runs if run.arm.settings == base.settings}
        places = [plan.out / arm for arm in sorted(arms) if any((plan.out / arm).rglob("metrics.jsonl"))]
        report = plan.out / ("report.html" if len(bases) == 1 else f"report-{base.name}.html")
        print(f"\n{plan.out}, against {base.name}:")
        try:
            leaderboard.main(tuple(places), baseline=base.name, out=report)
        except InputError as error:
            print(f"no leaderboard: {error}", file=sys.stderr)


def parse_confirm(words: Sequence[str]) -> tuple[int, int]:
    """
    >>> parse_confirm(["top=3", "seeds=8"])
    (3, 8)
    """
    found = dict(re.findall(r"^(top|seeds)=([1-9]\d*)$", "\n".join(words), re.MULTILINE))
    if len(found) != 2 or len(words) != 2:
        raise InputError(f"--confirm {' '.join(words)}: expected top=K seeds=N, e.g. --confirm top=3 seeds=8")
    return int(found["top"]), int(found["seeds"])


def confirmation(screen: Plan, top: int, num_seeds: int, remember: bool) -> Plan:
    """The plan that trains the best arms of a finished screen and their controls on fresh seeds.

    Best is the lowest mean of final losses, less that of the random of the same settings. What was chosen is written
    down, so that a confirmation in progress goes on with it. Raises InputError if a run of the screen is missing.
    """
    out = screen.out.with_name(f"{screen.out.name}-confirm")
    memory = out / "selected.json"
    proper = [arm for arm in screen.arms if arm.kind == "arm"]
    if memory.exists():
        chosen = read_json(memory)["arms"]
        if len(chosen) != top:
            raise InputError(
                f"{memory}: this confirmation was begun with top={len(chosen)}; go on with that, or remove {out}"
            )
    else:
        losses: dict[Arm, list[float]] = {}
        for arm, order_seed, init_seed in screen.pairs():
            folder = screen.out / arm.name / f"order{order_seed}-seed{init_seed}"
            if (loss := final_loss(folder)) is None:
                raise InputError(f"{folder}: not finished: the screen comes first; run the sweep without --confirm")
            losses.setdefault(arm, []).append(loss)
        base = {arm.settings: statistics.fmean(losses[arm]) for arm in screen.arms if arm.kind == "random"}
        gain = {arm.name: statistics.fmean(losses[arm]) - base[arm.settings] for arm in proper}
        if top > len(proper):
            raise InputError(f"--confirm top={top}: the screen has {len(proper)} arms")
        chosen = sorted(gain, key=gain.get)[:top]
        if remember:
            below = {name: -gain[name] for name in chosen}
            write_json(memory, dict(arms=chosen, screen=str(screen.out), nats_below_random=below))
    if missing := set(chosen) - {arm.name for arm in proper}:
        raise InputError(
            f"{memory}: it chose {', '.join(sorted(missing))}, which the sweep no longer has; remove {out}"
        )
    arms = with_controls([arm for arm in proper if arm.name in chosen], screen.sweep.confirm_controls)
    seeds = screen.seeds.model_copy(update=dict(order=num_seeds))
    return Plan(out, screen.sweep, arms, seeds, FRESH)


if __name__ == "__main__":
    command(main)
