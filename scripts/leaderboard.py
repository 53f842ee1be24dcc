"""Compare finished runs: a table on the terminal, a report as one HTML file that works offline, a record to keep.

    python -m scripts.leaderboard runs/random runs/increasing --baseline random --out report.html
    python -m scripts.leaderboard runs/answer --baseline random --record first-answer     # records/<date>-first-answer
    python -m scripts.leaderboard --check                    # is every recorded row still what its runs say?
    python -m scripts.leaderboard modded-nanogpt/records/some_record --target 3.28        # text logs of public runs

A record is a folder of three files: `runs.jsonl.gz` (of every run, left out ones too, its first row and its
validations), `arms.json` (settings and order hashes by arm, for reading) and `table.md`. The last two follow from the
first and from the options in record.json, and --check derives them again. README.md shows the tables between two
marker lines; nothing is ever read from there.
"""

import datetime
import gzip
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np

from curriculum import compare
from curriculum.records import Arms, Run, as_compared, gather_logs, gather_runs, usable_arms
from data.cli import InputError, command, fail
from data.files import atomic_folder, read_json, write_text

RECORD_VERSION = 1
BEGIN, END = "<!-- leaderboard begins -->", "<!-- leaderboard ends -->"
KEPT = ("step", "tokens", "val_nats", "time_s")  # of a validation; the last one also keeps its loss by bin


def main(
    runs: tuple[Path, ...] = (),
    /,
    baseline: str = "",
    out: Path | None = None,
    target: float = 0.0,
    scoring_cost_tokens: float = 0.0,
    effect: float = 0.0,
    alpha: float = compare.ALPHA,
    record: str = "",
    check: bool = False,
    records: Path = Path("records"),
    readme: Path = Path("README.md"),
) -> None:
    """Rank arms (runs of one name) by final validation loss against a baseline, with p-values.

    Args:
        runs: run folders, or folders of run folders; or text logs of the public speedrun, grouped by folder.
        baseline: name of the arm the others are compared with, usually random.
        out: also write the report, a self-contained HTML file, here.
        target: validation loss (nats) that a run is to reach, e.g. 3.28; adds tokens to it and the public rules.
        scoring_cost_tokens: what the scores cost, in tokens of training, for each run that shares them.
        effect: improvement in nats for which the needed number of order seeds is said.
        alpha: chance of any false claim.
        record: keep the comparison as records/<date>-<RECORD> and show it in the README.
        check: derive all records again, and fail if anything differs.
        records: folder of the records.
        readme: file with the two marker lines of the leaderboard.
    """
    if check:
        if runs or record:
            raise InputError("--check reads the records alone: give no runs and no --record with it")
        return check_records(records, readme)
    if not runs:
        raise InputError("no runs given; usage: python -m scripts.leaderboard RUNS... --baseline NAME, or --check")
    if not 0 < alpha < 1 or target < 0 or scoring_cost_tokens < 0 or effect < 0:
        raise InputError(
            f"--alpha {alpha}, --target {target}, --scoring-cost-tokens {scoring_cost_tokens}, --effect {effect}: "
            "expected alpha between 0 and 1, the others 0 or more"
        )
    if out is not None and out.is_dir():
        raise InputError(f"--out {out}: is a folder; name an .html file")
    if not any(place.is_dir() and next(place.rglob("metrics.jsonl"), None) for place in runs) and any(
        place.is_file() or next(place.rglob("*.txt"), None) or next(place.rglob("*.log"), None) for place in runs
    ):
        if out is not None or record:
            raise InputError("text logs hold no settings and no orders: --out and --record need run folders")
        print(public_logs(runs, target or compare.PUBLIC_TARGET, baseline, alpha))
        return
    if not baseline:
        raise InputError("--baseline is missing: name the arm the others are compared with, e.g. --baseline random")
    options = dict(baseline=baseline, target=target, scoring_cost_tokens=scoring_cost_tokens, alpha=alpha)
    if record:
        folder = new_record(records, record)
        split_readme(readme)  # that it can be shown is known before anything is written
    found, unreadable = gather_runs(runs)
    arms, rows = derive(found, unreadable, options)
    print(table_text(arms, rows, options))
    if effect:
        sd = pooled_sd(rows)
        said = (
            f"{compare.required_n(effect, sd, alpha=alpha, comparisons=max(1, len(rows) - 1))} order seeds in each arm"
            if sd
            else "unknown: no arm has two order seeds"
        )
        print(f"to show {effect:g} nats with a chance of 80 %: {said}")
    if out is not None:
        from curriculum.report import render

        write_text(out, render(arms, rows, alpha, target or None))
        print(f"report: {out}")
    if record:
        about = dict(version=RECORD_VERSION, command=shlex.join(["python", "-m", "scripts.leaderboard", *sys.argv[1:]]))
        write_record(folder, about | options | dict(unreadable=unreadable), found, arms, rows)
        show_records(records, readme)
        print(f"record: {folder}, shown in {readme}")


def derive(found: list[Run], unreadable: list[str], options: dict) -> tuple[Arms, list[compare.Row]]:
    """All that a table says, from its runs. The one way from runs to rows, for new ones and recorded ones."""
    arms = usable_arms(found, options["baseline"])
    arms.problems[:0] = unreadable
    samples = as_compared(arms, options["target"] or None, options["scoring_cost_tokens"])
    return arms, compare.compare(samples, options["baseline"], options["alpha"])


def table_text(arms: Arms, rows: list[compare.Row], options: dict) -> str:
    """The table, what it can resolve, the public rules where a target was given, and a note for every doubt."""
    parts = [compare.markdown(compare.columns(rows, arms.baseline)), "", resolution(rows, options["alpha"])]
    if saved := next((row.saved for row in rows if row.saved), None):
        cost = options["scoring_cost_tokens"]
        parts.append(
            f"Tokens saved: of the baseline tokens that an arm's tokens are worth; slope from {saved.said}"
            + (f"; less scoring: {cost:,.0f} tokens for each run ordered by a model's scores." if cost else ".")
        )
    if options["target"]:
        public = [compare.public_rules(row.name, row.mean_U, options["target"]) for row in rows]
        parts += ["", compare.markdown(compare.public_columns(public, options["target"]))]
    return "\n".join([*parts, *(f"note: {problem}" for problem in arms.problems)])


def resolution(rows: list[compare.Row], alpha: float) -> str:
    """What a comparison of this size could have shown."""
    tested = [row for row in rows if row.test and row.test.p is not None]
    base = next(row for row in rows if row.is_baseline)
    sd = pooled_sd(rows)
    if not tested or not sd:
        return "Nothing is tested: that takes two order seeds of an arm and of its baseline."
    least = min(row.n for row in tested)
    effect = compare.smallest_effect(sd, least, base.n, alpha=alpha, comparisons=len(tested))
    return (
        f"n counts order seeds. With {least} against {base.n}, a spread of {sd:.4f} nats (pooled) and "
        f"{compare.several(len(tested), 'arm')} under Holm at {alpha:g}, an improvement of {effect:.4f} nats "
        "is shown 8 times in 10."
    )


def pooled_sd(rows: list[compare.Row]) -> float | None:
    """Spread between order seeds over all arms that have two."""
    held = [row for row in rows if row.sd is not None]
    freedom = sum(row.n - 1 for row in held)
    return float(np.sqrt(sum((row.n - 1) * row.sd**2 for row in held) / freedom)) if freedom else None


# ----------------------------------------------------------------------------------------------------------------------
# Text logs of the public speedrun


def public_logs(places: tuple[Path, ...], target: float, baseline: str, alpha: float) -> str:
    """Means, spreads and p-values of each folder of logs, by the public rules, and against `baseline`."""
    groups, problems = gather_logs(places)
    if baseline and baseline not in groups:
        raise InputError(f"--baseline {baseline}: no folder of logs has that name; there are: {', '.join(groups)}")
    public = [compare.public_rules(name, [log.final_val_nats for log in logs], target) for name, logs in groups.items()]
    table = compare.public_columns(public, target)
    table["steps"] = [f"{logs[0].steps:,}" for logs in groups.values()]
    reached = [[compare.first_reached(log.step_P, log.loss_P, target) for log in logs] for logs in groups.values()]
    table[f"steps to {target:g}"] = [
        f"{np.mean(steps):,.0f}" if np.isfinite(steps).all() else f"{np.isfinite(steps).sum()} of {len(steps)} runs"
        for steps in reached
    ]
    table["train s"] = [
        f"{np.mean([log.time_s for log in logs]):,.1f}" if all(log.time_s is not None for log in logs) else "–"
        for logs in groups.values()
    ]
    parts = [compare.markdown(table)]
    if baseline:
        arms = {name: compare.Arm([[log.final_val_nats] for log in logs], baseline) for name, logs in groups.items()}
        compared = compare.columns(compare.compare(arms, baseline, alpha), baseline)
        del compared["claim"]  # of these nobody made a placebo
        parts += ["", compare.markdown(compared)]
    parts.append("note: public runs share one data order: their spread is that of initial weights and hardware alone")
    return "\n".join([*parts, *(f"note: {problem}" for problem in problems)])


# ----------------------------------------------------------------------------------------------------------------------
# Records


def new_record(records: Path, name: str) -> Path:
    """Where a record of this name and day will lie."""
    if not re.fullmatch(r"[\w.+-]+", name):
        raise InputError(f"--record {name!r}: expected letters, digits and . _ + -")
    folder = records / f"{datetime.datetime.now(datetime.UTC).date()}-{name}"
    if folder.exists():
        raise InputError(f"{folder}: already there; choose another --record name, or remove it")
    return folder


def write_record(folder: Path, about: dict, found: list[Run], arms: Arms, rows: list[compare.Row]) -> None:
    top = Path(os.path.commonpath([run.folder.resolve() for run in found]))
    kept = [kept_run(run, run.folder.resolve().relative_to(top).as_posix()) for run in found]
    if len(found) == 1:
        kept = [kept_run(found[0], found[0].folder.name)]
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as file:  # the same bytes for the same runs
        file.write("".join(json.dumps(run) + "\n" for run in kept).encode())
    with atomic_folder(folder) as temporary:
        (temporary / "record.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (temporary / "runs.jsonl.gz").write_bytes(buffer.getvalue())
        for name, text in derived_files(temporary).items():  # from what was kept, so that --check finds the same
            (temporary / name).write_text(text, encoding="utf-8")


def kept_run(run: Run, place: str) -> dict:
    """What a record keeps of a run: numbers at full precision, since rows are derived from them again."""
    rows = [{key: row[key] for key in KEPT if key in row} for row in run.rows if "val_nats" in row]
    ends = [row["bin_nats"] for row in run.rows if "bin_nats" in row and row["step"] == run.about["steps"]]
    if rows and ends:
        rows[-1]["bin_nats"] = ends[-1]
    return dict(folder=place, about=run.about, rows=rows)


def read_record(folder: Path) -> tuple[dict, list[Run]]:
    """The options of a record and its runs. InputError if it is not whole."""
    about, path = read_json(folder / "record.json"), folder / "runs.jsonl.gz"
    if about.get("version") != RECORD_VERSION:
        raise InputError(f"{folder}: record version {about.get('version')}, expected {RECORD_VERSION}")
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        kept = [json.loads(line) for line in lines]
        return about, [Run(Path(run["folder"]), run["about"], run["rows"]) for run in kept]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the runs of a record ({type(error).__name__}: {error})") from None


def derived_files(folder: Path) -> dict[str, str]:
    """The files of a record that follow from its runs, by name."""
    about, found = read_record(folder)
    arms, rows = derive(found, about["unreadable"], about)
    described = {
        name: dict(
            config=members[0].about["config"],
            code_sha256=sorted({str(run.about.get("code_sha256")) for run in members}),
            runs=[
                dict(
                    folder=str(run.folder),
                    seed=run.about["seed"],
                    val_nats=run.final_val_nats,
                    order=run.about["order"],
                )
                for run in members
            ],
        )
        for name, members in arms.runs.items()
    }
    return {"arms.json": json.dumps(described, indent=1) + "\n", "table.md": table_text(arms, rows, about) + "\n"}


def check_records(records: Path, readme: Path) -> None:
    """Derive every record again; leave with 1 and a line for every difference."""
    folders = record_folders(records)
    if not folders:
        print(f"{records}: no records there, nothing to check")
        return
    wrong, num_rows = [], 0
    for folder in folders:
        try:
            derived = derived_files(folder)
        except InputError as error:
            wrong.append(str(error))
            continue
        num_rows += len(json.loads(derived["arms.json"]))
        for name, text in derived.items():
            stored = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""
            wrong += differing(folder / name, stored, text)
    if not wrong:
        before, shown, after = split_readme(readme)
        wrong += differing(readme, before + shown + after, before + shown_text(records) + after)
    if wrong:
        fail("; ".join(wrong), code=1)
    print(
        f"{compare.several(len(folders), 'record')}, {compare.several(num_rows, 'arm')}: every row is what its runs say"
    )


def differing(path: Path, stored: str, derived: str) -> list[str]:
    """A sentence on the first line that differs; none if the texts are the same."""
    if stored == derived:
        return []
    theirs, ours = stored.splitlines(), derived.splitlines()
    i = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    line = [lines[i] if i < len(lines) else "no such line" for lines in (theirs, ours)]
    return [f"{path}: line {i + 1} is {line[0]!r}, its runs give {line[1]!r}"]


def record_folders(records: Path) -> list[Path]:
    """The newest first."""
    return sorted((path.parent for path in records.glob("*/record.json")), reverse=True)


def shown_text(records: Path) -> str:
    """What the README shows: the table of every record."""
    parts = ["", "<!-- generated by python -m scripts.leaderboard --record; edits are lost -->"]
    for folder in record_folders(records):
        lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
        notes = sum(line.startswith("note: ") for line in lines)
        said = f"{notes} note{'s' if notes != 1 else ''} and all runs" if notes else "All runs"
        parts += ["", f"**{folder.name}** ([{said}]({folder.as_posix()}/table.md))", ""]
        parts += [line for line in lines if not line.startswith("note: ")]
    return "\n".join([*parts, "", ""])


def split_readme(readme: Path) -> tuple[str, str, str]:
    """The README up to the first marker, between the markers, and from the second on. InputError without them."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(
            f"{readme}: the leaderboard goes between the lines {BEGIN} and {END}, and they are not there, once "
            "each and in this order: add them"
        )
    head, _, rest = text.partition(BEGIN)
    shown, _, tail = rest.partition(END)
    return head + BEGIN, shown, END + tail


def show_records(records: Path, readme: Path) -> None:
    before, _, after = split_readme(readme)
    write_text(readme, before + shown_text(records) + after)


if __name__ == "__main__":
    command(main)
