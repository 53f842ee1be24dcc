"""Statistics of a comparison. NumPy in, plain rows out; scipy and statsmodels are the oracles of its tests.

**Unit.** An order seed. Runs that share an order differ by their initial weights alone, so their mean is one draw of
the order; n counts such draws, and a spread is one between orders.

**Test.** All arms stop at the same token. Welch's one-sided t-test on the final validation loss (is the arm's lower?),
Mann-Whitney's rank test beside it, Holm's correction over the arms of a track. `order` arms trained on the tokens of
their baseline and differ in order alone; `selection` arms trained on others, and are never tested among the orders.

**Claim.** An arm is tested against three others: its baseline, its placebo (the same schedule over bins of segments
drawn by chance) and its length control (the same schedule over bins of the segments' length). It is a *win* if it beats
each of them, and only if Holm's correction of the largest of its three p-values holds too: that p is valid whichever of
the three comparisons is the empty one, so false wins stay below alpha over all arms together.

**Tokens saved.** The baseline's loss is taken to be linear in ln(tokens) near the end, with slope b. An arm that ends
at a difference D is worth exp(D / b) times its tokens of baseline training; `share` = 1 - exp(-D / b) is what it saves.
The interval is the delta method's for D / b, whose two errors share the baseline's runs: every run's linear influence
on the ratio is summed group by group, with Satterthwaite's degrees of freedom. It needs no resampling, which with five
runs has only 126 samples to draw from, and it is given only where b itself is clearly negative.

Suffixes of arrays: U units of an arm, R its runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

CONFIDENCE = 0.95
ALPHA = 0.05
ORDER, SELECTION = "order", "selection"
CLAIMS = ("baseline", "placebo", "length")  # the three others an arm is tested against
# The rules of the public leaderboards (KellerJordan/modded-nanogpt): their target, and track 3's assumed spread.
PUBLIC_TARGET, PUBLIC_SIGMA, PUBLIC_MARGIN = 3.28, 0.0013, 0.004


# ----------------------------------------------------------------------------------------------------------------------
# What goes in, what comes out


@dataclass(frozen=True)
class Slope:
    """The baseline's loss per unit of ln(tokens), as each run's part in it: parts of a group are averaged, then added.

    `base_U` are parts of the very runs an arm is compared with, `other_V` of others (the baseline at another length).
    """

    base_U: np.ndarray
    other_V: np.ndarray
    said: str  # where it was measured

    @property
    def nats(self) -> float:
        return float(self.base_U.mean()) + (float(self.other_V.mean()) if len(self.other_V) else 0.0)


@dataclass(frozen=True)
class Arm:
    """Final losses (nats) of an arm's runs, and the names of the arms it is tested against ("": there is none)."""

    losses: Sequence[Sequence[float]]  # of the runs of each order seed
    baseline: str = ""
    placebo: str = ""
    length: str = ""
    track: str = ORDER
    unfinished: int = 0  # runs that are left out because they have no final loss
    tokens: int = 0
    scoring_tokens: float = 0.0  # cost of its scores, in training tokens
    steps_to_target_R: Sequence[float] = ()  # NaN for a run that did not reach it
    tokens_to_target_R: Sequence[float] = ()
    slope: Slope | None = None  # of a baseline

    @property
    def mean_U(self) -> np.ndarray:
        return np.array([np.mean(runs) for runs in self.losses])


@dataclass(frozen=True)
class Against:
    """Of an arm against another. None where n is too small for the number to exist."""

    name: str  # of the other
    difference: float  # arm - other, in nats: negative is better
    low: float | None = None  # confidence interval of the difference, not corrected
    high: float | None = None
    p: float | None = None  # Welch, one-sided: the chance of so low a mean if the arm were no better
    p_holm: float | None = None  # corrected for the number of arms
    pair_U: tuple = field(default=(), repr=False, compare=False)  # what was compared

    @cached_property
    def p_rank(self) -> float | None:
        """The same by Mann-Whitney; made when it is asked for, since scipy's takes a millisecond."""
        from scipy import stats

        return None if self.p is None else float(stats.mannwhitneyu(*self.pair_U, alternative="less").pvalue)


@dataclass(frozen=True)
class Saved:
    """Tokens of baseline training that an arm makes unnecessary, as a share; negative if it wastes some."""

    share: float
    low: float | None
    high: float | None
    net: float  # the same after paying for the scores
    said: str  # whence the slope


@dataclass(frozen=True)
class Row:
    """One arm. Losses in nats; None where n is too small for the number to exist."""

    name: str
    n: int  # order seeds
    num_runs: int
    mean: float
    mean_U: np.ndarray = field(repr=False, compare=False)  # of each order seed
    sd: float | None = None
    low: float | None = None  # confidence interval of the mean
    high: float | None = None
    track: str = ORDER
    is_baseline: bool = False
    unfinished: int = 0
    tests: Mapping[str, Against] = field(default_factory=dict)  # by CLAIMS
    p_win: float | None = None  # Holm's correction of the largest of the three p
    beaten: tuple[str, ...] = ()  # of CLAIMS
    win: bool = False
    saved: Saved | None = None
    reached: int | None = None  # runs that reached the target; None if there was none
    tokens_to_target: float | None = None  # means over runs, None unless all reached it
    steps_to_target: float | None = None

    @property
    def test(self) -> Against | None:
        """Against its baseline."""
        return self.tests.get("baseline")


# ----------------------------------------------------------------------------------------------------------------------
# The comparison


def compare(arms: Mapping[str, Arm], baseline: str, alpha: float = ALPHA) -> list[Row]:
    """Rows of all arms: the baseline first, then by track and mean."""
    rows = {name: describe(name, arm, arms) for name, arm in arms.items()}
    holm = {}  # (kind of claim, arm) -> corrected p
    for track in (ORDER, SELECTION):
        inside = {name: row.tests for name, row in rows.items() if row.track == track}
        p_of = {
            kind: {name: t[kind].p for name, t in inside.items() if kind in t and t[kind].p is not None}
            for kind in CLAIMS
        }
        p_of["win"] = {
            name: max(p_of[kind][name] for kind in CLAIMS)
            for name in inside
            if all(name in p_of[kind] for kind in CLAIMS)
        }
        for kind, p_by_name in p_of.items():
            holm |= {(kind, name): p for name, p in corrected(p_by_name).items()}
    for name, row in rows.items():
        tests = {kind: replace(test, p_holm=holm.get((kind, name))) for kind, test in row.tests.items()}
        beaten = tuple(kind for kind, test in tests.items() if test.p_holm is not None and test.p_holm < alpha)
        p_win = holm.get(("win", name))
        whole = not row.unfinished and not any(arms[test.name].unfinished for test in tests.values())
        win = len(beaten) == len(CLAIMS) and p_win < alpha and whole
        rows[name] = replace(row, tests=tests, beaten=beaten, p_win=p_win, win=win)
    return sorted(rows.values(), key=lambda r: (r.name != baseline, r.track != ORDER, r.mean, r.name))


def describe(name: str, arm: Arm, arms: Mapping[str, Arm]) -> Row:
    """All of a row that does not depend on how many arms there are."""
    mean_U = arm.mean_U
    mean, n = float(mean_U.mean()), len(mean_U)
    sd = float(mean_U.std(ddof=1)) if n >= 2 else None
    low = high = None
    if sd is not None:
        half = quantile_of_t(n - 1) * sd / math.sqrt(n)
        low, high = mean - half, mean + half
    others = {kind: getattr(arm, kind) for kind in CLAIMS}
    tests = {kind: set_against(mean_U, arms[o].mean_U, o) for kind, o in others.items() if o in arms and o != name}
    base = arms.get(arm.baseline)
    saved = None
    if base is not None and base.slope is not None and "baseline" in tests:
        saved = tokens_saved(mean_U, base.mean_U, base.slope, arm.scoring_tokens / max(arm.tokens, 1))
    reached_R = np.isfinite(np.asarray(arm.tokens_to_target_R, dtype=float))
    every = bool(len(reached_R)) and bool(reached_R.all())
    return Row(
        name=name,
        n=n,
        num_runs=sum(len(runs) for runs in arm.losses),
        mean=mean,
        mean_U=mean_U,
        sd=sd,
        low=low,
        high=high,
        track=arm.track,
        is_baseline=arm.baseline == name,
        unfinished=arm.unfinished,
        tests=tests,
        saved=saved,
        reached=int(reached_R.sum()) if len(reached_R) else None,
        tokens_to_target=float(np.mean(arm.tokens_to_target_R)) if every else None,
        steps_to_target=float(np.mean(arm.steps_to_target_R)) if every else None,
    )


def set_against(value_U: np.ndarray, other_U: np.ndarray, name: str) -> Against:
    """Welch's test: is `value_U` lower? `scipy.stats.ttest_ind` is the oracle in the tests; from its parts p and the
    two-sided interval cost 80 us and not 1.4 ms, and simulated sweeps take seconds."""
    from scipy.special import stdtr

    difference = float(value_U.mean() - other_U.mean())
    error, freedom = error_of_means([value_U, other_U])
    # Without any spread there is nothing to measure a difference by: no test, rather than one of p = 0.
    if not error:
        return Against(name, difference)
    half, p = quantile_of_t(freedom) * error, float(stdtr(freedom, difference / error))
    return Against(name, difference, difference - half, difference + half, p, pair_U=(value_U, other_U))


def corrected(p_by_name: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction. statsmodels' is the oracle in the tests; it collects garbage at every call, 80 ms each time.

    >>> corrected({"a": 0.01, "b": 0.03})
    {'a': 0.02, 'b': 0.03}
    """
    ordered = sorted(p_by_name, key=p_by_name.get)
    raised = (min(1.0, (len(ordered) - i) * p_by_name[name]) for i, name in enumerate(ordered))
    return dict(zip(ordered, accumulate(raised, max), strict=True))


def quantile_of_t(freedom: float) -> float:
    """Half-width of a confidence interval, in standard errors."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def claim(row: Row, baseline: str = "baseline") -> str:
    """What a row shows, in words.

    >>> claim(Row("fold", 1, 1, 3.0, np.array([3.0])))
    'not tested: no baseline of its settings'
    """
    prefix = "selection: " if row.track == SELECTION else ""
    if row.is_baseline:
        return "baseline" if row.n > 1 else "baseline of one order seed: nothing is tested"
    if row.test is None:
        return "not tested: no baseline of its settings"
    if row.test.p is None:
        return prefix + ("not tested: one order seed" if row.n == 1 else "not tested")
    names = dict(baseline=baseline, placebo="placebo", length="length")
    if row.win:
        return f"{prefix}**win**"
    lacking = [names[kind] for kind in CLAIMS if kind not in row.tests or row.tests[kind].p is None]
    left = f" (untested against {', '.join(lacking)})" if lacking and row.beaten else ""
    if row.beaten:
        return f"{prefix}beats {', '.join(names[kind] for kind in row.beaten)}{left}" + (
            f"; {row.unfinished} unfinished" if row.unfinished else ""
        )
    return prefix + ("worse" if row.test.low > 0 else "nothing shown")


# ----------------------------------------------------------------------------------------------------------------------
# Tokens saved, tokens to a target


def slope_of_lengths(base_U: np.ndarray, tokens: float, other_V: np.ndarray, other_tokens: float) -> Slope:
    """From the baseline trained twice, on `tokens` and on `other_tokens`: the exchange rate of the public track 3."""
    stretch = math.log(tokens / other_tokens)
    return Slope(
        np.asarray(base_U) / stretch,
        -np.asarray(other_V) / stretch,
        f"baseline at {other_tokens / tokens:.3g} of the tokens, n = {len(other_V)}",
    )


def slope_of_curve(tokens_P: np.ndarray, loss_P: np.ndarray, begin: float = 0.8) -> float | None:
    """A run's own slope per ln(tokens) over its last part, from the validation nearest to the share `begin` on.

    Not what another length would give: in a cooldown the loss falls faster than with the tokens, so this slope is too
    steep and the tokens saved come out too few.
    """
    if len(tokens_P) < 2:
        return None
    i = int(np.argmin(np.abs(np.asarray(tokens_P[:-1]) - begin * tokens_P[-1])))
    if not tokens_P[i] > 0:
        return None
    return float((loss_P[-1] - loss_P[i]) / math.log(tokens_P[-1] / tokens_P[i]))


def tokens_saved(arm_U: np.ndarray, base_U: np.ndarray, slope: Slope, cost_share: float = 0.0) -> Saved | None:
    """See the module's head. `cost_share` is the scores' price over the arm's tokens. None if b is not negative.

    >>> slope = slope_of_lengths(np.array([3.0, 3.0]), 2.0, np.array([3.1, 3.1]), 1.0)
    >>> round(tokens_saved(np.array([2.9, 2.9]), np.array([3.0, 3.0]), slope).share, 12)  # worth twice the tokens
    0.5
    """
    b = slope.nats
    if not b < 0:
        return None
    ratio = float(arm_U.mean() - base_U.mean()) / b
    spread, freedom = error_of_means([slope.base_U, slope.other_V])
    parts = [arm_U / b, -base_U / b - ratio * slope.base_U / b, -ratio * slope.other_V / b]
    low = high = None
    # With a slope that might as well be flat, the ratio may be anything: no interval.
    if spread is not None and b + quantile_of_t(freedom) * spread < 0:
        error, freedom = error_of_means(parts)
        if error:
            half = quantile_of_t(freedom) * error
            low, high = 1 - math.exp(-(ratio - half)), 1 - math.exp(-(ratio + half))
    saved = 1 - math.exp(-ratio)
    return Saved(saved, low, high, 1 - (1 + cost_share) * math.exp(-ratio), slope.said)


def error_of_means(groups: Sequence[np.ndarray]) -> tuple[float | None, float]:
    """Standard error of a sum (or difference) of means of independent groups, and Satterthwaite's degrees of freedom.

    None where a group has a single member, whose spread nobody knows; 0 where there is no spread at all.
    """
    held = [g for g in groups if len(g)]
    if any(len(g) < 2 for g in held):
        return None, 0.0
    if not any(np.ptp(g) for g in held):  # not the variance, which rounding leaves above 0
        return 0.0, 1.0
    variances = np.array([g.var(ddof=1) / len(g) for g in held])
    freedom = variances.sum() ** 2 / sum(v**2 / (len(g) - 1) for v, g in zip(variances, held, strict=True))
    return float(np.sqrt(variances.sum())), float(freedom)


def first_reached(x_P: np.ndarray, loss_P: np.ndarray, target: float) -> float:
    """Where a curve first comes down to `target`, read off between validations; NaN if it never does.

    >>> first_reached(np.array([10.0, 20.0]), np.array([4.0, 3.0]), 3.25), first_reached([1.0], [3.3], 3.28)
    (17.5, nan)
    """
    below = np.flatnonzero(np.asarray(loss_P) <= target)
    if not len(below):
        return math.nan
    i = int(below[0])
    if i == 0:
        return float(x_P[0])
    share = (loss_P[i - 1] - target) / (loss_P[i - 1] - loss_P[i])
    return float(x_P[i - 1] + share * (x_P[i] - x_P[i - 1]))


# ----------------------------------------------------------------------------------------------------------------------
# How many order seeds


def power(
    effect_nats: float,
    sd_nats: float,
    n_arm: int,
    n_baseline: int | None = None,
    *,
    alpha: float = ALPHA,
    comparisons: int = 1,
) -> float:
    """Chance that the test shows a true improvement of `effect_nats`; n counts order seeds, sd is between them.

    `comparisons` is the number of arms under Holm's correction, taken at its first and hardest step.
    """
    grid = welch_grid(n_arm, n_baseline or n_arm, alpha / comparisons)
    return 0.0 if grid is None else chance(effect_nats / sd_nats, *grid)


def smallest_effect(
    sd_nats: float,
    n_arm: int,
    n_baseline: int | None = None,
    *,
    wanted: float = 0.8,
    alpha: float = ALPHA,
    comparisons: int = 1,
) -> float:
    """The improvement in nats that is shown with the chance `wanted`; infinite if an arm has a single order seed."""
    from scipy.optimize import brentq

    grid = welch_grid(n_arm, n_baseline or n_arm, alpha / comparisons)
    if grid is None:
        return math.inf
    most = 1.0
    while chance(most, *grid) < wanted:
        most *= 2
    return sd_nats * float(brentq(lambda ratio: chance(ratio, *grid) - wanted, 0, most, xtol=1e-9))


def required_n(
    effect_nats: float, sd_nats: float, *, wanted: float = 0.8, alpha: float = ALPHA, comparisons: int = 1
) -> int:
    """Order seeds in each arm, the baseline included, for an effect to be shown with the chance `wanted`."""
    if not effect_nats > 0:
        raise ValueError(f"effect_nats {effect_nats}: expected a positive improvement")

    def enough(n: int) -> bool:
        return power(effect_nats, sd_nats, n, alpha=alpha, comparisons=comparisons) >= wanted

    most = 2
    while not enough(most):
        most *= 2
    least = most // 2  # not enough, or 1
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most


def welch_grid(n_arm: int, n_baseline: int, alpha: float) -> tuple[float, np.ndarray] | None:
    """Standard error of the difference in units of sd, and Welch's threshold at every pair of sample variances.

    The pooled test's power is too hopeful at n = 2 to 4, where Welch's degrees of freedom fall to n - 1. Given both
    sample variances the test is a threshold on a normal difference, so its power is a mean over two chi-squares, here
    at equal steps of probability. None if there is no test.
    """
    from scipy.special import chdtri, stdtrit

    if min(n_arm, n_baseline) < 2:
        return None
    upper_Q = (np.arange(160) + 0.5) / 160
    variance = [chdtri(n - 1, upper_Q) / (n - 1) / n for n in (n_arm, n_baseline)]
    a_QQ, b_QQ = np.meshgrid(*variance, indexing="ij")
    freedom_QQ = (a_QQ + b_QQ) ** 2 / (a_QQ**2 / (n_arm - 1) + b_QQ**2 / (n_baseline - 1))
    return math.sqrt(1 / n_arm + 1 / n_baseline), stdtrit(freedom_QQ, 1 - alpha) * np.sqrt(a_QQ + b_QQ)


def chance(effect: float, error: float, threshold_QQ: np.ndarray) -> float:
    """Chance that a normal difference of mean `effect` passes its threshold, all in units of sd."""
    from scipy.special import ndtr

    return float(ndtr((effect - threshold_QQ) / error).mean())


# ----------------------------------------------------------------------------------------------------------------------
# The rules of the public leaderboards


@dataclass(frozen=True)
class Public:
    """A group of runs against a fixed target."""

    name: str
    n: int
    mean: float
    sd: float | None
    p: float | None  # track 1: one-sample t-test, is the mean below the target?
    score: float  # track 3: (target - mean) sqrt(n), in nats
    p_known: float  # of that score, with the public sd
    passes: bool  # score >= 0.004


def public_rules(name: str, losses: Sequence[float], target: float = PUBLIC_TARGET) -> Public:
    """Track 1 takes the runs' own spread, track 3 that of many earlier runs (0.0013 nats); both are one-sided.

    Public runs share one data order, so both leave out the spread between orders: they are for public logs, and beside
    them for ours, never in place of a comparison with random orders.
    """
    from scipy import stats

    values = np.asarray(losses, dtype=float)
    n, mean = len(values), float(values.mean())
    score = (target - mean) * math.sqrt(n)
    sd = float(values.std(ddof=1)) if n >= 2 else None
    p = float(stats.ttest_1samp(values, target, alternative="less").pvalue) if sd else None
    # 3.28 - 3.276 is 0.004 on paper and 3e-17 less in binary.
    passes = score >= PUBLIC_MARGIN - 1e-12
    return Public(name, n, mean, sd, p, score, float(stats.norm.sf(score / PUBLIC_SIGMA)), passes)


# ----------------------------------------------------------------------------------------------------------------------
# Tables: one way to write a row, for the terminal, README, records and the report


def number(value: float | None, spec: str = ".4f") -> str:
    """
    >>> number(0.5), number(None)
    ('0.5000', '–')
    """
    return "–" if value is None else format(value, spec)


def several(count: int, noun: str) -> str:
    """
    >>> several(1, "arm"), several(2, "arm")
    ('1 arm', '2 arms')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def interval(low: float | None, high: float | None, spec: str = "+.4f") -> str:
    return "–" if low is None else f"{low:{spec}} … {high:{spec}}"


def percent(saved: Saved | None) -> str:
    if saved is None:
        return "–"
    bounds = "" if saved.low is None else f" ({100 * saved.low:+.1f} … {100 * saved.high:+.1f})"
    return f"{100 * saved.share:+.1f} %{bounds}"


def p_of(kind: str, name: str) -> Callable[[Row], str]:
    return lambda row: number(getattr(row.tests[kind], name), ".3g") if kind in row.tests else "–"


def columns(rows: Sequence[Row], baseline: str) -> dict[str, list[str]]:
    """The table, column by column, as text; columns with nothing in them are left out, n never is."""
    cells: dict[str, Callable[[Row], str]] = {
        "arm": lambda row: row.name,
        "n": lambda row: str(row.n) if row.n == row.num_runs else f"{row.n} ({row.num_runs} runs)",
        "val loss (nats)": lambda row: number(row.mean),
        "sd": lambda row: number(row.sd),
        "vs baseline": lambda row: number(row.test.difference, "+.4f") if row.test else "–",
        "95 % interval": lambda row: interval(row.test.low, row.test.high) if row.test else "–",
        "p (Holm)": p_of("baseline", "p_holm"),
        "claim": lambda row: claim(row, baseline),
        "tokens saved": lambda row: percent(row.saved),
        "less scoring": lambda row: (
            f"{100 * row.saved.net:+.1f} %" if row.saved and row.saved.net != row.saved.share else "–"
        ),
        "p": p_of("baseline", "p"),
        "p (ranks)": p_of("baseline", "p_rank"),
        "placebo: p (Holm)": p_of("placebo", "p_holm"),
        "length: p (Holm)": p_of("length", "p_holm"),
        "tokens to target": lambda row: (
            "–"
            if row.reached is None
            else number(row.tokens_to_target, ",.0f")
            if row.tokens_to_target is not None
            else f"{row.reached} of {row.num_runs} runs"
        ),
        "steps to it": lambda row: number(row.steps_to_target, ",.0f"),
    }
    table = {title: [cell(row) for row in rows] for title, cell in cells.items()}
    return {title: found for title, found in table.items() if title in ("arm", "n") or set(found) != {"–"}}


def public_columns(rows: Sequence[Public], target: float) -> dict[str, list[str]]:
    return {
        "runs": [row.name for row in rows],
        "n": [str(row.n) for row in rows],
        "val loss (nats)": [number(row.mean, ".5f") for row in rows],
        "sd": [number(row.sd, ".5f") for row in rows],
        f"p, mean < {target:g} (t)": [number(row.p, ".3g") for row in rows],
        f"({target:g} − mean)·√n": [number(row.score, "+.5f") for row in rows],
        f"p (sd {PUBLIC_SIGMA})": [number(row.p_known, ".3g") for row in rows],
        f"≥ {PUBLIC_MARGIN}": ["yes" if row.passes else "no" for row in rows],
    }


def markdown(table: Mapping[str, Sequence[str]]) -> str:
    """Columns of text as a Markdown table: names and claims to the left, numbers to the right.

    >>> print(markdown({"arm": ["a"], "n": ["2"]}))
    | arm | n |
    |---|--:|
    | a | 2 |
    """
    rule = ["---" if i == 0 or title == "claim" else "--:" for i, title in enumerate(table)]
    lines = [f"| {' | '.join(table)} |", f"|{'|'.join(rule)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in zip(*table.values(), strict=True))])
