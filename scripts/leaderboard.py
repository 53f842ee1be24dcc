"""Compare finished runs: a table on the terminal, and a report as one HTML file that works offline.

python -m scripts.leaderboard runs/random runs/increasing --baseline random --out report.html
"""

from pathlib import Path

import numpy as np

from curriculum.compare import compare, markdown
from curriculum.records import find_runs, usable_arms
from data.cli import InputError, command
from data.files import write_text


def main(runs: tuple[Path, ...], /, baseline: str, out: Path | None = None) -> None:
    """Rank arms (runs of one name) by final validation loss against a baseline, with p-values.

    Args:
        runs: run folders, or folders of run folders.
        baseline: name of the arm the others are compared with, usually random.
        out: also write the report, a self-contained HTML file, here.
    """
    if out is not None and out.is_dir():
        raise InputError(f"--out {out}: is a folder; name an .html file")
    found = find_runs(runs)
    arms, problems = usable_arms(found, baseline)
    rows = compare({name: np.array([r.final_val_nats for r in members]) for name, members in arms.items()}, baseline)
    print(markdown(rows))
    for problem in problems:
        print(f"note: {problem}")
    if out is not None:
        from curriculum.report import render

        write_text(out, render(arms, rows, problems, baseline))
        print(f"report: {out}")


if __name__ == "__main__":
    command(main)
