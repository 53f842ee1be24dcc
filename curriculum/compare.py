"""Statistics of a comparison. NumPy in, plain rows out; the tests are scipy's and statsmodels'.

A unit is a run with its own order seed. All arms stop at the same token; each is compared with the baseline by Welch's
one-sided t-test on the final validation loss (is the arm's lower?), with Holm's correction over the arms.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """One arm. Losses in nats; None where n is too small for the number to exist."""

    name: str
    n: int
    mean: float
    sd: float | None
    difference: float | None  # arm - baseline: negative is better; None for the baseline
    low: float | None  # confidence interval of the difference
    high: float | None
    p: float | None  # one-sided: the chance of so low a mean if the arm were no better
    p_holm: float | None  # corrected for the number of arms


def compare(losses: Mapping[str, np.ndarray], baseline: str) -> list[Row]:
    """Rows of all arms, the baseline first, the others by mean. `losses` holds final losses (n,) by arm."""
    from scipy import stats
    from statsmodels.stats.multitest import multipletests

    base = np.asarray(losses[baseline], dtype=float)
    rows, tests = [], {}
    for name, values in losses.items():
        # Without any spread there is nothing to measure a difference by: no test, rather than one of p = 0.
        if name != baseline and min(len(values), len(base)) >= 2 and (np.ptp(values) or np.ptp(base)):
            tests[name] = stats.ttest_ind(values, base, equal_var=False, alternative="less")
    raw = {name: float(test.pvalue) for name, test in tests.items()}
    holm = dict(zip(raw, multipletests(list(raw.values()), method="holm")[1], strict=True)) if raw else {}
    for name, values in losses.items():
        values = np.asarray(values, dtype=float)
        difference = low = high = None
        if name != baseline:
            difference = float(values.mean() - base.mean())
            if name in raw:
                two_sided = stats.ttest_ind(values, base, equal_var=False)
                low, high = map(float, two_sided.confidence_interval(CONFIDENCE))
        sd = float(values.std(ddof=1)) if len(values) >= 2 else None
        p, p_holm = raw.get(name), float(holm[name]) if name in holm else None
        rows.append(Row(name, len(values), float(values.mean()), sd, difference, low, high, p, p_holm))
    return sorted(rows, key=lambda row: (row.name != baseline, row.mean))


def markdown(rows: list[Row]) -> str:
    """The leaderboard as a Markdown table."""

    def number(value: float | None, spec: str = ".4f") -> str:
        return "–" if value is None else format(value, spec)

    lines = [
        "| arm | n | val loss (nats) | sd | vs baseline | 95 % interval | p | p (Holm) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        interval = f"{row.low:+.4f} … {row.high:+.4f}" if row.low is not None else "–"
        cells = [
            row.name,
            str(row.n),
            number(row.mean),
            number(row.sd),
            number(row.difference, "+.4f"),
            interval,
            number(row.p, ".3g"),
            number(row.p_holm, ".3g"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
