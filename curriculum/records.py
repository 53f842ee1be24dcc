"""Run folders read back: metrics.jsonl is the only source.

The first row of metrics.jsonl says what the run is (`kind: "run"`: name, seed, config, order, hashes, hardware); the
others carry `step`, `tokens`, `time_s` (training time, validation not counted) and `train_nats` or `val_nats` with
`bin_nats`. A run is finished when its last step was validated; half a last line (a killed run) is not read.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curriculum.config import LOCATIONS
from data.cli import InputError

FIRST_ROW = {"name", "steps", "config", "identity", "order", "val_tokens"}


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
    def final_val_nats(self) -> float | None:
        """Validation loss at the last step; None if the run did not get there."""
        last = [r["val_nats"] for r in self.rows if r["step"] == self.about["steps"] and "val_nats" in r]
        return last[-1] if last else None

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values of every row that has `key` (e.g. "val_nats"), both (rows,)."""
        found = [(r["tokens"], r[key]) for r in self.rows if key in r]
        return np.array([t for t, _ in found]), np.array([v for _, v in found], dtype=float)


def read_run(folder: Path) -> Run:
    """A run folder; InputError if its metrics.jsonl is missing, empty or not ours."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{folder}: no metrics.jsonl there: not a run folder")
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut off by a kill
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"{path}: line {number} is not JSON: {line[:60]!r}") from None
        rows.append(row if isinstance(row, dict) else {})
    if not rows or rows[0].get("kind") != "run" or not FIRST_ROW <= rows[0].keys():
        raise InputError(
            f"{path}: its first row does not describe a run: the run never started, or another program wrote it"
        )
    if any(not {"step", "tokens"} <= row.keys() for row in rows[1:]):
        raise InputError(f"{path}: a row without step and tokens: not a row of train_gpt.py")
    return Run(folder, rows[0], rows[1:])


def find_runs(places: Iterable[Path]) -> list[Run]:
    """All runs at or below the given folders, in the order of their paths. InputError if a folder holds none."""
    runs: dict[Path, Run] = {}
    for place in places:
        found = sorted(path.parent for path in Path(place).rglob("metrics.jsonl"))
        if not found:
            raise InputError(f"{place}: no run there (no metrics.jsonl at or below it)")
        runs |= {folder.resolve(): read_run(folder) for folder in found}
    return list(runs.values())


def usable_arms(runs: list[Run], baseline: str) -> tuple[dict[str, list[Run]], list[str]]:
    """Finished, comparable runs by name, the baseline first; and a sentence for every run left out, with its reason.

    Raises InputError if no finished run has the baseline's name.
    """
    problems = [f"{r.folder}: not finished: left out" for r in runs if r.final_val_nats is None]
    finished = [r for r in runs if r.final_val_nats is not None]
    base = [r for r in finished if r.name == baseline]
    if not base:
        names = ", ".join(sorted({r.name for r in finished})) or "none"
        raise InputError(f"--baseline {baseline}: no finished run has that name; finished are: {names}")
    arms: dict[str, list[Run]] = {baseline: []}
    for run in finished:
        first = (arms.get(run.name) or [base[0] if run.name == baseline else run])[0]
        if run.validation != base[0].validation:
            problems.append(f"{run.folder}: validated on other tokens than {base[0].folder}: left out")
        elif run.about["identity"]["digest"] != first.about["identity"]["digest"]:
            problems.append(
                f"{run.folder}: another configuration under the name {run.name} than {first.folder}: left out"
            )
        elif run.about["identity"] in [r.about["identity"] for r in arms.get(run.name, [])]:
            problems.append(f"{run.folder}: the same run (config, seed and order) as another folder: left out")
        else:
            arms.setdefault(run.name, []).append(run)
    for name, members in arms.items():
        if len({r.order_key for r in members}) < len(members):
            problems.append(f"{name}: some runs share one data order: their spread understates that of the order")
        if changed := sorted(settings(members[0]).items() ^ settings(base[0]).items()):
            names = ", ".join(dict.fromkeys(key for key, _ in changed))
            problems.append(f"{name}: differs from {baseline} in {names}: a difference is not of order alone")
        if any(r.rows[-1]["tokens"] < r.about["order"]["tokens"] for r in members):
            problems.append(f"{name}: stops before its order ends: arms have seen different tokens")
        multisets = {r.about["order"].get("multiset_sha256") for r in members}
        if multisets != {base[0].about["order"].get("multiset_sha256")}:
            problems.append(
                f"{name}: trained on other tokens than {baseline}: a difference is one of selection, not of order"
            )
    return arms, problems


def settings(run: Run) -> dict[str, str]:
    """Every setting that changes numbers, as `table.key`: what must be equal for two arms to differ by order alone."""
    flat = {
        f"{table}.{key}": str(value)
        for table, values in run.about["config"].items()
        for key, value in values.items()
        if table != "run" and key not in LOCATIONS
    }
    return flat | {"steps": str(run.about["steps"])}
