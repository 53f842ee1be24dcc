"""Run folders and public logs read back, and sorted into arms that may be compared.

The first row of metrics.jsonl says what the run is (`kind: "run"`: name, seed, config, order, hashes, hardware); the
others carry `step`, `tokens`, `time_s` (training time, validation not counted) and `train_nats` or `val_nats` with
`bin_nats`. A run is finished when its last step was validated; half a last line (a killed run) is not read.

What is left out is left out by rule, never by result, and named:

    unreadable          no first row of ours, or a line that is not JSON
    unfinished, NaN     no final loss, or one that is no number; its arm is then not called a win
    another validation  than the baseline's first run
    mixed configs       under one name the configuration with most runs stays (of equals, the first by path)
    doubled             the same config, seed and order twice

What stays and cannot be tested, or only as selection, is named as well.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from curriculum import compare
from curriculum.config import LOCATIONS
from curriculum.measures import MODEL_MEASURES
from data.cli import InputError

FIRST_ROW = {"name", "steps", "config", "identity", "order", "val_tokens"}
# How an order was made, measure and schedule apart: an arm and its controls agree in these. What a run did not record
# is None in both.
MAKING = ("bins", "layout", "multiset", "epochs")


@dataclass(frozen=True)
class Run:
    folder: Path
    about: dict  # the first row
    rows: list[dict]

    @property
    def name(self) -> str:
        return self.about["name"]

    @property
    def order_key(self) -> str:
        """Runs of one arm with the same key share their data order and are not independent draws of it."""
        return self.about["identity"]["order_sha256"]

    @property
    def validation(self) -> tuple:
        """What must be equal for two losses to be compared."""
        return self.about["identity"]["val_segments_sha256"], self.about["val_tokens"]

    @property
    def digest(self) -> str:
        """Of its configuration, seeds apart."""
        return self.about["identity"]["digest"]

    @property
    def measure(self) -> str:
        return self.about["order"].get("measure", "")

    @property
    def schedule(self) -> str:
        return self.about["order"].get("schedule", "stock")

    @property
    def tokens(self) -> int:
        """Trained on at its last row."""
        return self.rows[-1]["tokens"]

    @cached_property
    def settings(self) -> dict[str, str]:
        """All that changes numbers, as `table.key`: what must be equal for two arms to differ by order alone."""
        flat = {
            f"{table}.{key}": str(value)
            for table, values in self.about["config"].items()
            for key, value in values.items()
            if table != "run" and key not in LOCATIONS
        }
        return flat | {"steps": str(self.about["steps"])}

    @cached_property
    def final_val_nats(self) -> float | None:
        """Validation loss at the last step; None if the run did not get there."""
        last = [r["val_nats"] for r in self.rows if r["step"] == self.about["steps"] and "val_nats" in r]
        return last[-1] if last else None

    def curve(self, key: str, over: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
        """Tokens (or steps) and values of every row that has `key` (e.g. "val_nats"), both (rows,)."""
        found = [(r[over], r[key]) for r in self.rows if key in r]
        return np.array([t for t, _ in found]), np.array([v for _, v in found], dtype=float)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_run(folder: Path) -> Run:
    """A run folder; InputError if its metrics.jsonl is missing, empty or not ours."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{folder}: no metrics.jsonl there: not a run folder")
    return as_run(folder, path.read_text(encoding="utf-8", errors="replace"), path)


def as_run(folder: Path, text: str, source: Path) -> Run:
    """A run from the text of its metrics.jsonl; `source` is what errors name."""
    lines = text.split("\n")[:-1]  # what follows the last newline was cut off by a kill
    try:
        rows = json.loads(f"[{','.join(lines)}]")  # all at once: twice as fast
    except ValueError:
        rows = []
    if len(rows) != len(lines):  # line by line, to name the bad one
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise InputError(f"{source}: line {number} is not JSON: {line[:60]!r}") from None
    rows = [row if isinstance(row, dict) else {} for row in rows]
    if not rows or rows[0].get("kind") != "run" or not FIRST_ROW <= rows[0].keys():
        raise InputError(
            f"{source}: its first row does not describe a run: the run never started, or another program wrote it"
        )
    if any(not {"step", "tokens"} <= row.keys() for row in rows[1:]):
        raise InputError(f"{source}: a row without step and tokens: not a row of train_gpt.py")
    return Run(folder, rows[0], rows[1:])


def gather_runs(places: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """All runs at or below the given folders, in the order of their paths, and a sentence for each that is unreadable.

    InputError if a folder holds none at all.
    """
    runs: dict[Path, Run] = {}
    problems = []
    for place in places:
        found = sorted(path.parent for path in Path(place).rglob("metrics.jsonl"))
        if not found:
            raise InputError(f"{place}: no run there (no metrics.jsonl at or below it)")
        for folder in found:
            if folder.resolve() in runs:
                continue
            try:
                runs[folder.resolve()] = read_run(folder)
            except InputError as error:
                problems.append(f"{error}: left out")
    return list(runs.values()), list(dict.fromkeys(problems))


def find_runs(places: Iterable[Path]) -> list[Run]:
    """The same, where a run that cannot be read is an InputError."""
    runs, problems = gather_runs(places)
    if problems:
        raise InputError(problems[0].removesuffix(": left out"))
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# Logs of the public speedrun


LOG_LINE = re.compile(
    r"^step:(?P<step>\d+)/(?P<steps>\d+) val_loss:(?P<loss>\S+)(?: train_time:(?P<time>[\d.]+)(?P<unit>ms|s)\b)?", re.M
)


@dataclass(frozen=True)
class Log:
    """A run in a text log of KellerJordan/modded-nanogpt: losses at steps. It knows no seed, and no tokens."""

    path: Path
    steps: int
    step_P: np.ndarray
    loss_P: np.ndarray
    time_s: float | None  # at the last validation

    @property
    def final_val_nats(self) -> float | None:
        return float(self.loss_P[-1]) if self.step_P[-1] == self.steps else None


def read_logs(path: Path) -> list[Log]:
    """The runs of one file: usually one, several where the trainer repeated itself (`num_trials`).

    InputError if there is no line of the known form. The source that such a log begins with holds the same words, but
    format fields where the numbers would be.
    """
    found = list(LOG_LINE.finditer(path.read_text(encoding="utf-8", errors="replace")))
    if not found:
        raise InputError(f"{path}: no line of the form step:S/T val_loss:...: not a log of the public speedrun")
    begins = [i for i, m in enumerate(found) if i == 0 or int(m["step"]) <= int(found[i - 1]["step"])]
    logs = []
    for begin, end in zip(begins, [*begins[1:], len(found)], strict=True):
        last = found[end - 1]
        seconds = float(last["time"]) / (1000 if last["unit"] == "ms" else 1) if last["time"] else None
        try:
            step_P, loss_P = (np.array([float(m[key]) for m in found[begin:end]]) for key in ("step", "loss"))
        except ValueError as error:
            raise InputError(f"{path}: a val_loss is no number ({error})") from None
        logs.append(Log(path, int(last["steps"]), step_P, loss_P, seconds))
    return logs


def gather_logs(places: Iterable[Path]) -> tuple[dict[str, list[Log]], list[str]]:
    """Finished runs by the folder of their log (.txt, .log), and a sentence for each that is left out.

    InputError if there are none.
    """
    groups: dict[Path, list[Log]] = {}
    problems = []
    for place in places:
        paths = [place] if place.is_file() else sorted(p for kind in ("txt", "log") for p in place.rglob(f"*.{kind}"))
        if not paths:
            raise InputError(f"{place}: no run there (no metrics.jsonl, .txt or .log file at or below it)")
        for path in paths:
            if any(log.path == path for log in groups.get(path.parent, [])):
                continue
            try:
                groups.setdefault(path.parent, []).extend(read_logs(path))
            except InputError as error:
                problems.append(f"{error}: left out")
    named = {}
    for folder, logs in groups.items():
        lengths = [log.steps for log in logs]
        most = max(lengths, key=lengths.count, default=0)
        kept = []
        for log in logs:
            if log.steps != most:
                problems.append(f"{log.path}: a run of {log.steps} steps, most of its folder have {most}: left out")
            elif log.final_val_nats is None:
                problems.append(f"{log.path}: stops at step {log.step_P[-1]:.0f} of {log.steps}: left out")
            elif not math.isfinite(log.final_val_nats):
                problems.append(f"{log.path}: its final loss is {log.final_val_nats}: left out")
            else:
                kept.append(log)
        if kept:
            named[folder.name if folder.name not in named else str(folder)] = kept
    if not named:
        raise InputError(problems[0])
    return named, problems


# ----------------------------------------------------------------------------------------------------------------------
# Arms


@dataclass(frozen=True)
class Arms:
    """Runs that may be compared, by arm; the baseline first."""

    baseline: str
    runs: dict[str, list[Run]]
    problems: list[str]  # a sentence for whatever was left out or is not as it should be
    unfinished: dict[str, int] = field(default_factory=dict)  # runs without a final loss, by arm


def usable_arms(runs: list[Run], baseline: str) -> Arms:
    """Finished, comparable runs by name; see the module's head for the rules.

    Raises InputError if no finished run has the baseline's name.
    """
    problems, unfinished, named = [], {}, {baseline: []}
    for run in runs:
        loss = run.final_val_nats
        if loss is not None and math.isfinite(loss):
            named.setdefault(run.name, []).append(run)
        else:
            unfinished[run.name] = unfinished.get(run.name, 0) + 1
            reason = "not finished" if loss is None else f"its final loss is {loss}"
            problems.append(f"{run.folder}: {reason}: left out")
    if not named[baseline]:
        names = ", ".join(sorted(named.keys() - {baseline})) or "none"
        raise InputError(f"--baseline {baseline}: no finished run has that name; finished are: {names}")
    for name, members in named.items():
        digests = [run.digest for run in members]
        kept = max(digests, key=digests.count)
        first = members[digests.index(kept)]
        problems += [
            f"{run.folder}: another configuration under the name {name} than {first.folder}: left out"
            for run in members
            if run.digest != kept
        ]
        named[name] = [run for run in members if run.digest == kept]
    first, arms = named[baseline][0], {}
    for name, members in named.items():
        for run in members:
            if run.validation != first.validation:
                problems.append(f"{run.folder}: validated on other tokens than {first.folder}: left out")
            elif run.about["identity"] in [other.about["identity"] for other in arms.get(name, [])]:
                problems.append(f"{run.folder}: the same run (config, seed and order) as another folder: left out")
            else:
                arms.setdefault(name, []).append(run)
    for name in arms:
        problems += doubts(name, arms, baseline)
    return Arms(baseline, arms, problems, unfinished)


def doubts(name: str, arms: Mapping[str, list[Run]], baseline: str) -> list[str]:
    """What must be known of an arm before its row is read."""
    said, members = [], arms[name]
    orders = len(units(members))
    if 1 < orders < len(members):
        said.append(
            f"{name}: {len(members)} runs on {orders} data orders: those of one order are averaged, n is {orders}"
        )
    if orders == 1:
        said.append(f"{name}: one order seed only: the spread between orders is unknown, nothing is tested")
    own = baseline_of(name, arms, baseline)
    base = arms[own or baseline]
    if not own:
        changed = members[0].settings.items() ^ base[0].settings.items()
        names = ", ".join(dict.fromkeys(key for key, _ in sorted(changed)))
        said.append(
            f"{name}: differs from {baseline} in {names}: a difference is not of order alone, and no {baseline} of "
            "its settings is there: not tested"
        )
    elif own not in (baseline, name):
        said.append(f"{name}: compared with {own}, which is {baseline} with its settings")
    if not all(map(ends_with_its_order, members)):
        said.append(f"{name}: stops before its order ends: arms have seen different tokens")
    elif own and not same_tokens(members, base):
        said.append(f"{name}: trained on other tokens than {own}: a difference is one of selection, not of order")
    if own and len({run.about.get("code_sha256") for run in [*members, *base]}) > 1:
        said.append(f"{name}: not all of its runs and those of {own} were trained by the same version of the code")
    return said


def units(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs by order seed."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.order_key, []).append(run)
    return list(found.values())


def ends_with_its_order(run: Run) -> bool:
    return run.tokens >= run.about["order"].get("tokens", 0)


def same_tokens(members: list[Run], base: list[Run]) -> bool:
    return len({run.about["order"].get("multiset_sha256") for run in [*members, *base]}) == 1


# -- Whom an arm is tested against: what its order's manifest and its settings say, never its name


def baseline_of(name: str, arms: Mapping[str, list[Run]], baseline: str) -> str:
    """The arm with the baseline's order and this arm's settings: the baseline itself or its like; "" if none is."""
    run, base = arms[name][0], arms[baseline][0]
    if run.settings == base.settings:
        return baseline
    return next((o for o, (r, *_) in arms.items() if same_order(r, base) and r.settings == run.settings), "")


def same_order(run: Run, base: Run) -> bool:
    """Ordered in the same way; for the order `random` the measure it does not look at may be any."""
    alike = ("schedule",) if base.schedule == "random" else ("schedule", "measure", *MAKING)
    return all(run.about["order"].get(key) == base.about["order"].get(key) for key in alike)


def control_of(name: str, arms: Mapping[str, list[Run]], measure: str, schedule: str) -> str:
    """The arm that is this one but for the measure or the schedule of its order; "" if there is none."""
    run = arms[name][0]
    for other, (there, *_) in arms.items():
        if (there.measure, there.schedule) != (measure, schedule) or other == name:
            continue
        making, makings = ([r.about["order"].get(key) for key in MAKING] for r in (run, there))
        if making == makings and there.settings == run.settings:
            return other
    return ""


def other_length(name: str, arms: Mapping[str, list[Run]]) -> list[Run]:
    """The runs of this arm's order and settings on another number of tokens, the nearest there is; [] if there is none.

    Trained to its end, not cut off: learning rates fall with the share of a run's own tokens.
    """
    run = arms[name][0]
    found = [
        members
        for members in arms.values()
        if members[0].tokens != run.tokens
        and same_order(members[0], run)
        and members[0].settings | {"steps": ""} == run.settings | {"steps": ""}
    ]
    return min(found, key=lambda members: abs(math.log(members[0].tokens / run.tokens)), default=[])


def as_compared(arms: Arms, target: float | None = None, scoring_tokens: float = 0.0) -> dict[str, compare.Arm]:
    """What the statistics need of every arm. Its placebo is `placebo(X)` of the same measure and bins, its length
    control X by `length`; an arm whose measure needs a reference bears `scoring_tokens`."""
    found, of = {}, arms.runs
    for name, members in of.items():
        first, base = members[0], baseline_of(name, of, arms.baseline)
        controls = {}  # of a control none are asked
        if not same_order(first, of[arms.baseline][0]) and not first.schedule.startswith("placebo("):
            controls["placebo"] = control_of(name, of, first.measure, f"placebo(schedule={first.schedule})")
            controls["length"] = control_of(name, of, "length", first.schedule)
        order_alone = all(map(ends_with_its_order, members)) and (not base or same_tokens(members, of[base]))
        if order_alone:  # and so must be what it is tested against
            controls = {kind: o if o and same_tokens(members, of[o]) else "" for kind, o in controls.items()}
        reached = {
            over: [compare.first_reached(*run.curve("val_nats", over), target) for run in members] if target else []
            for over in ("tokens", "step")
        }
        found[name] = compare.Arm(
            losses=[[run.final_val_nats for run in unit] for unit in units(members)],
            baseline=base,
            track=compare.ORDER if order_alone else compare.SELECTION,
            unfinished=arms.unfinished.get(name, 0),
            tokens=first.tokens,
            scoring_tokens=scoring_tokens if needs_reference(first) else 0.0,
            tokens_to_target_R=reached["tokens"],
            steps_to_target_R=reached["step"],
            slope=slope_of(members, other_length(name, of)) if base == name else None,
            **controls,
        )
    return found


def slope_of(members: list[Run], others: list[Run]) -> compare.Slope | None:
    """Of a baseline: from its runs at another length where there are some, else from its own curves."""
    if others:
        final, other = (
            np.array([np.mean([run.final_val_nats for run in unit]) for unit in units(runs)])
            for runs in (members, others)
        )
        return compare.slope_of_lengths(final, members[0].tokens, other, others[0].tokens)
    slopes = [[compare.slope_of_curve(*run.curve("val_nats")) for run in unit] for unit in units(members)]
    if any(slope is None for unit in slopes for slope in unit):
        return None
    of_each = np.array([np.mean(unit) for unit in slopes])
    return compare.Slope(of_each, np.array([]), "the baseline's own last fifth, which errs towards zero")


def needs_reference(run: Run) -> bool:
    """Whether its order was made from a model's scores."""
    words = set(re.findall(r"[a-z_]+", run.measure))
    return run.schedule != "random" and bool(words & {*MODEL_MEASURES, "learnability"})
