"""Schedules: how much of each bin a run wants at each moment. Pure functions, NumPy in, NumPy out.

A schedule maps progress t in [0, 1] (in tokens) to weights over B bins: non-negative, each row summing to 1. Bin 0
holds the lowest values of the measure; bin b spans the ranks from b / B to (b + 1) / B. Most families slide a window
whose centre mu(t) is a curve and whose width is `sigma`, a fraction of all ranks: sigma, not B, is the true coarse/fine
knob. Others divide the ranks into equal levels, or cut them off, and mean the same at any B.

A schedule is written as an expression, the same in TOML and on the command line, parsed and never executed:

    parse("then(fold(5), random, tau=0.2)")

Weights are wishes. In an exact order (curriculum/order.py) rows and columns are scaled until every bin is used up just
once: what a family asks of a bin at all times alike is lost there. `tilt` and `mid_out` say what that leaves of them.

To add one: write a function that returns a `Schedule`, put it into FAMILIES and into the gallery of scripts/preview.py;
the tests try it by itself, and say so if they need the range of a new parameter.

Shapes: T moments, B bins, L levels, S stages.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np

from curriculum.expressions import literal, read_expression
from data.cli import InputError

Stages = list[tuple[float, list[float]]]  # (until, weights over L equal levels)


@dataclass(frozen=True)
class Schedule:
    """What a run wants: `weights(t_T, num_bins)` -> (T, B).

    `iid_spans` are stretches of progress where emission times are drawn uniformly rather than spread evenly:
    there the order is that of an honest shuffle, with its chance fluctuations, as in a random baseline.
    `placebo` asks the order to permute the map from segments to bins: same quotas, no meaning.
    `stock` asks it to leave the corpus as it lies, whatever the bins.
    `adaptive` leaves the weights to the run: the numbers of the rule by which it finds them (curriculum/adaptive.py).
    """

    weights: Callable[[np.ndarray, int], np.ndarray]
    iid_spans: tuple[tuple[float, float], ...] = ()
    placebo: bool = False
    stock: bool = False
    adaptive: dict[str, float] | None = None
    text: str = ""  # the expression with every argument spelled out: equal texts are equal schedules


# ----------------------------------------------------------------------------------------------------------------------
# Shapes of a moment: from a few numbers to a row of weights


def uniform(t_T: np.ndarray, num_bins: int) -> np.ndarray:
    return np.full((len(t_T), num_bins), 1 / num_bins)


def middles(num_bins: int) -> np.ndarray:
    """Ranks of the middles of the bins, (B,)."""
    return (np.arange(num_bins) + 0.5) / num_bins


def softmax(exponent_TB: np.ndarray) -> np.ndarray:
    weights_TB = np.exp(exponent_TB - exponent_TB.max(1, keepdims=True))
    return weights_TB / weights_TB.sum(1, keepdims=True)


def window(mu_T: np.ndarray, num_bins: int, sigma: float) -> np.ndarray:
    """Rows (T, B) proportional to exp(-(rank_b - mu)^2 / (2 sigma^2)).

    sigma = 0 is the sharpest window there is: the two bins nearest to mu, mixed linearly.

    >>> window(np.array([0.0, 0.5, 1.0]), 2, 0.0)
    array([[1. , 0. ],
           [0.5, 0.5],
           [0. , 1. ]])
    """
    rank_B = middles(num_bins)
    if sigma == 0:
        mu_T = np.clip(mu_T, rank_B[0], rank_B[-1])
        weights_TB = np.maximum(0.0, 1 - np.abs(mu_T[:, None] - rank_B) * num_bins)
        return weights_TB / weights_TB.sum(1, keepdims=True)
    # Below 1e-6 of all ranks a window is as sharp as it can be, and its square would underflow.
    return softmax(-((mu_T[:, None] - rank_B) ** 2) / (2 * max(sigma, 1e-6) ** 2))


def spread_levels(weights_SL: np.ndarray, num_bins: int) -> np.ndarray:
    """Weights over L equal levels of rank as weights over B bins (S, B): a level is spread evenly over its ranks.

    >>> spread_levels(np.array([[1.0, 0.0, 0.0]]), 4).round(3)
    array([[0.75, 0.25, 0.  , 0.  ]])
    """
    num_levels = weights_SL.shape[1]
    level_L, bin_B = np.arange(num_levels + 1) / num_levels, np.arange(num_bins + 1) / num_bins
    overlap_LB = np.minimum(level_L[1:, None], bin_B[1:]) - np.maximum(level_L[:-1, None], bin_B[:-1])
    weights_SB = weights_SL @ np.maximum(overlap_LB, 0.0)
    return weights_SB / weights_SB.sum(1, keepdims=True)


# ----------------------------------------------------------------------------------------------------------------------
# Controls


def random() -> Schedule:
    """Every bin alike at every moment, placed by chance: the control. Several order seeds are needed of it.

    >>> random().weights(np.array([0.0, 1.0]), 2), random().iid_spans
    (array([[0.5, 0.5],
           [0.5, 0.5]]), ((0.0, 1.0),))
    """
    return Schedule(uniform, iid_spans=((0.0, 1.0),))


def stock() -> Schedule:
    """The corpus as it lies in its shards, unshuffled: what other trainers read. No part of any other schedule."""
    return Schedule(uniform, stock=True)


def stratified() -> Schedule:
    """Every bin alike at every moment, spread evenly: each batch has its exact share of every bin.

    >>> stratified().weights(np.array([0.0, 1.0]), 2), stratified().iid_spans
    (array([[0.5, 0.5],
           [0.5, 0.5]]), ())
    """
    return Schedule(uniform)


# ----------------------------------------------------------------------------------------------------------------------
# A window on its way. sigma: 0 (the two nearest bins) to 10 (hardly any order left)


def sliding(centre: Callable[[np.ndarray], np.ndarray], sigma: float) -> Schedule:
    """The window of width sigma whose centre follows `centre(t)`."""
    check_range("sigma", sigma, 0, 10)
    return Schedule(lambda t_T, num_bins: window(centre(t_T), num_bins, sigma))


def increasing(sigma: float = 0.08) -> Schedule:
    """From low to high: mu = t. The classic curriculum (Bengio et al., ICML 2009).

    >>> increasing(sigma=0).weights(np.array([0.0, 1.0]), 3)
    array([[1., 0., 0.],
           [0., 0., 1.]])
    """
    return sliding(lambda t_T: t_T, sigma)


def decreasing(sigma: float = 0.08) -> Schedule:
    """From high to low: mu = 1 - t.

    >>> decreasing(sigma=0).weights(np.array([0.0, 1.0]), 2)
    array([[0., 1.],
           [1., 0.]])
    """
    return sliding(lambda t_T: 1 - t_T, sigma)


def v(p: float = 0.5, sigma: float = 0.08) -> Schedule:
    """High, low at t = p (0 < p < 1), high again: mu = 1 - t/p, then (t - p) / (1 - p).

    >>> v(0.5, sigma=0).weights(np.array([0.0, 0.5, 1.0]), 2)
    array([[0., 1.],
           [1., 0.],
           [0., 1.]])
    """
    check_range("p", p, 0, 1, open_ends=True)
    return sliding(lambda t_T: 1 - peak(t_T, p), sigma)


def inverted_v(p: float = 0.5, sigma: float = 0.08) -> Schedule:
    """Low, high at t = p (0 < p < 1), low again: mu = t/p, then (1 - t) / (1 - p).

    What parameter-golf's PR #737 calls a V-shape (peak at 0.45) is this one.

    >>> inverted_v(0.5, sigma=0).weights(np.array([0.0, 0.5, 1.0]), 2)
    array([[1., 0.],
           [0., 1.],
           [1., 0.]])
    """
    check_range("p", p, 0, 1, open_ends=True)
    return sliding(lambda t_T: peak(t_T, p), sigma)


def peak(t_T: np.ndarray, p: float) -> np.ndarray:
    return np.where(t_T < p, t_T / p, (1 - t_T) / (1 - p))


def fold(K: int = 5, sigma: float = 0.08) -> Schedule:
    """Sawtooth: from low to high K times (1 to 10000), mu = frac(K t); at t = 1 it ends high.

    The folding of DELT (arXiv 2506.21545), whose code has K = 5.

    >>> fold(2, sigma=0).weights(np.array([0.0, 0.4999, 0.5, 1.0]), 2).round(2)
    array([[1., 0.],
           [0., 1.],
           [1., 0.],
           [0., 1.]])
    """
    check_count("K", K)
    return sliding(lambda t_T: np.where(t_T < 1, (K * t_T) % 1.0, 1.0), sigma)


def zigzag(K: int = 5, sigma: float = 0.08) -> Schedule:
    """Triangle wave of K strokes (1 to 10000): low to high, high to low, ... An odd K ends high, an even one low.

    Folding without its jumps (the zig-zag ordering of microsoft/data-efficacy, arXiv 2605.30334).

    >>> zigzag(2, sigma=0).weights(np.array([0.0, 0.5, 1.0]), 2)
    array([[1., 0.],
           [0., 1.],
           [1., 0.]])
    """
    check_count("K", K)
    return sliding(lambda t_T: 1 - np.abs((K * t_T) % 2.0 - 1), sigma)


def trend_cycle(A: float = 0.2, K: int = 5, sigma: float = 0.08) -> Schedule:
    """From low to high in waves: mu = t + A sin(2 pi K t), kept within [0, 1]; A from 0 to 0.5, K from 1 to 10000.

    Above A = 1 / (2 pi K) the window turns back once a cycle: earlier ranks come again, as in spaced repetition.

    >>> trend_cycle(0.25, 1, sigma=0).weights(np.array([0.0, 0.25, 0.75, 1.0]), 2).round(3)
    array([[1. , 0. ],
           [0.5, 0.5],
           [0.5, 0.5],
           [0. , 1. ]])
    """
    check_range("A", A, 0, 0.5)
    check_count("K", K)
    return sliding(lambda t_T: np.clip(t_T + A * np.sin(2 * np.pi * K * t_T), 0, 1), sigma)


# ----------------------------------------------------------------------------------------------------------------------
# A density over ranks that changes its shape


def copula(rho: float = 0.5) -> Schedule:
    """One dial from decreasing (rho = -1) over stratified (0) to increasing (1): a Gaussian copula of time and rank.

    With x and y the normal quantiles of t and of a bin's middle, weights are proportional to the copula's density,
    exp(-(rho^2 y^2 - 2 rho x y) / (2 (1 - rho^2))). Already nearly exact: its columns would be equal but for the bins.

    >>> copula(0).weights(np.array([0.0, 1.0]), 2)
    array([[0.5, 0.5],
           [0.5, 0.5]])
    >>> copula(1).weights(np.array([0.0, 1.0]), 2)
    array([[1., 0.],
           [0., 1.]])
    """
    check_range("rho", rho, -1, 1)
    if abs(rho) == 1:
        return increasing(sigma=0) if rho == 1 else decreasing(sigma=0)

    def weights(t_T, num_bins):
        quantiles = np.vectorize(NormalDist().inv_cdf, otypes=[float])
        x_T1, y_B = quantiles(np.clip(t_T, 1e-9, 1 - 1e-9))[:, None], quantiles(middles(num_bins))
        return softmax((2 * rho * x_T1 * y_B - rho**2 * y_B**2) / (2 * (1 - rho**2)))

    return Schedule(weights)


def pacing(q: float = 2.0, c0: float = 0.01) -> Schedule:
    """Every rank up to the competence c alike, c = (c0^q + (1 - c0^q) t)^(1/q): from c0 (0 < c0 <= 1) to all.

    q (0.1 to 10): 1 linear, 2 the square root, 0.5 a square. From Platanios et al. (arXiv 1903.09848, q = 2,
    c0 = 0.01), who stop before the end: `then(pacing(2, 0.01), random, tau)`. For q < 1 competence can lag behind t;
    the last ranks then come too late for an exact order, which says so.

    >>> pacing(1, 0.5).weights(np.array([0.0, 0.5, 1.0]), 2).round(3)
    array([[1.   , 0.   ],
           [0.667, 0.333],
           [0.5  , 0.5  ]])
    """
    check_range("q", q, 0.1, 10)
    check_range("c0", c0, 0, 1, open_low=True)

    def weights(t_T, num_bins):
        competence_T = np.minimum((c0**q + (1 - c0**q) * t_T) ** (1 / q), 1.0)
        covered_TB = np.clip(competence_T[:, None] * num_bins - np.arange(num_bins), 0, 1)
        return covered_TB / covered_TB.sum(1, keepdims=True)

    return Schedule(weights)


def mid_out(s0: float = 0.05, s1: float = 0.5) -> Schedule:
    """From the middle ranks outwards: weights proportional to exp(-|rank - 1/2| / (s0 + s1 t)); s0, s1 from 0.01 to 10.

    Both tails come late, and junk (templates, mojibake) lives in the tails. In an exact order each segment comes once,
    so the last moments hold what the middle left over: the tails.

    >>> mid_out(0.1, 0.9).weights(np.array([0.0, 1.0]), 3).round(3)
    array([[0.033, 0.933, 0.033],
           [0.294, 0.411, 0.294]])
    """
    check_range("s0", s0, 0.01, 10)
    check_range("s1", s1, 0.01, 10)
    return Schedule(lambda t_T, num_bins: softmax(-np.abs(middles(num_bins) - 0.5) / (s0 + s1 * t_T)[:, None]))


def outside_in(s0: float = 0.05, s1: float = 0.5) -> Schedule:
    """From both tails to the middle: `mid_out(s0, s1)` in reverse.

    >>> outside_in(0.1, 0.9).weights(np.array([0.0, 1.0]), 3).round(3)
    array([[0.294, 0.411, 0.294],
           [0.033, 0.933, 0.033]])
    """
    return reverse(mid_out(s0, s1))


def tilt(beta0: float = -4.0, beta1: float = 4.0) -> Schedule:
    """A slope over the ranks: weights proportional to exp(beta (rank - 1/2)), beta from beta0 to beta1 (-100 to 100).

    A soft two-phase order, like the preference function of PDPC (arXiv 2501.13126). In an exact order only beta1 -
    beta0 counts: what is asked for steadily of a bin, the projection takes back.

    >>> tilt(-2, 2).weights(np.array([0.0, 0.5, 1.0]), 2).round(3)
    array([[0.731, 0.269],
           [0.5  , 0.5  ],
           [0.269, 0.731]])
    """
    check_range("beta0", beta0, -100, 100)
    check_range("beta1", beta1, -100, 100)
    return Schedule(lambda t_T, B: softmax((beta0 + (beta1 - beta0) * t_T)[:, None] * (middles(B) - 0.5)))


# ----------------------------------------------------------------------------------------------------------------------
# Stages


def discrete(stages: Stages) -> Schedule:
    """Constant in stages: [(until, weights), ...], `until` rising to 1, a stage's first moment in, its last one out.

    Weights are over equal levels of rank, lowest first, any number of them: as many as bins, and each is a bin's; else
    a level is spread evenly over its ranks. They are relative: [1, 3] is [0.25, 0.75].

    >>> discrete([(0.5, [1, 3]), (1, [1])]).weights(np.array([0.0, 0.5, 1.0]), 4)
    array([[0.125, 0.125, 0.375, 0.375],
           [0.25 , 0.25 , 0.25 , 0.25 ],
           [0.25 , 0.25 , 0.25 , 0.25 ]])
    """
    until_S = [until for until, _ in stages]
    if not stages or until_S[-1] != 1 or any(a >= b for a, b in zip([0, *until_S], until_S, strict=False)):
        raise InputError(f"schedule: stages of discrete end at {until_S}: expected rising numbers above 0, the last 1")
    for until, weights_L in stages:
        if not 1 <= len(weights_L) <= 1024 or not all(0 <= w < 1e9 for w in weights_L) or not sum(weights_L) > 0:
            raise InputError(
                f"schedule: discrete's stage until {until} has weights {weights_L}: "
                "expected 1 to 1024 numbers from 0 to 1e9, not all 0"
            )

    def weights(t_T, num_bins):
        rows_SB = np.vstack([spread_levels(np.array([weights_L], float), num_bins) for _, weights_L in stages])
        return rows_SB[np.searchsorted(until_S[:-1], t_T, side="right")]

    return Schedule(weights)


def sequential() -> Schedule:
    """Easy, then medium, then hard: three levels, one in each third of the run, none of them again.

    This and the next two are the schedules of Naïr et al., "Curriculum Learning for Small Code Language Models" (arXiv
    2407.10194), with the stage lengths of their code (here 40k, 40k, 40k iterations). They restart Adam and the
    learning rate with every stage; an order does not.

    >>> sequential().weights(np.array([0.0, 0.5, 1.0]), 3)
    array([[1., 0., 0.],
           [0., 1., 0.],
           [0., 0., 1.]])
    """
    return discrete([(1 / 3, [1, 0, 0]), (2 / 3, [0, 1, 0]), (1, [0, 0, 1])])


def incremental() -> Schedule:
    """Easy, then easy and medium alike, then all three alike; stages of 25k, 30k, 65k iterations (see `sequential`).

    >>> incremental().weights(np.array([0.0, 0.3, 1.0]), 3).round(3)
    array([[1.   , 0.   , 0.   ],
           [0.5  , 0.5  , 0.   ],
           [0.333, 0.333, 0.333]])
    """
    return discrete([(25 / 120, [1, 0, 0]), (55 / 120, [1, 1, 0]), (1, [1, 1, 1])])


def hybrid(replay: float = 0.25) -> Schedule:
    """A new level in each stage, with a share of the earlier ones: each weighs `replay` (0 < replay <= 1) of the new.

    Between `sequential` (replay towards 0) and `incremental` (1); stages of 20k, 30k, 70k iterations. The stages are
    those of Naïr et al. (see `sequential`); how much of the earlier levels they mix in is not in their code, so 0.25
    is ours. In an exact order the last stage also takes what is left of the easy level.

    >>> hybrid(0.5).weights(np.array([0.0, 0.3, 1.0]), 3)
    array([[1.        , 0.        , 0.        ],
           [0.33333333, 0.66666667, 0.        ],
           [0.25      , 0.25      , 0.5       ]])
    """
    check_range("replay", replay, 0, 1, open_low=True)
    return discrete([(20 / 120, [1, 0, 0]), (50 / 120, [replay, 1, 0]), (1, [replay, replay, 1])])


# ----------------------------------------------------------------------------------------------------------------------
# Combinators


def then(first: Schedule, second: Schedule, tau: float = 0.2) -> Schedule:
    """`first` over the first 1 - tau of the run, `second` over the last tau (0 < tau < 1).

    With `random` second, no run ends in an extreme bin: otherwise a periodic order measures little but its last stroke.

    >>> then(increasing(sigma=0), random(), tau=0.5).weights(np.array([0.0, 0.75]), 2)
    array([[1. , 0. ],
           [0.5, 0.5]])
    """
    check_range("tau", tau, 0, 1, open_ends=True)
    if first.stock or second.stock:
        raise InputError("stock leaves a whole corpus as it lies: it cannot be a part of then(...)")
    if first.placebo or second.placebo:
        raise InputError("placebo permutes the bins of a whole run: write placebo(then(...)), not then(placebo(...))")
    if first.adaptive or second.adaptive:
        raise InputError("adaptive finds the weights of a whole run as it goes: it cannot be a part of then(...)")
    cut = 1 - tau

    def weights(t_T, num_bins):
        early_TB = first.weights(np.clip(t_T / cut, 0, 1), num_bins)
        late_TB = second.weights(np.clip((t_T - cut) / tau, 0, 1), num_bins)
        return np.where((t_T < cut)[:, None], early_TB, late_TB)

    early = tuple((a * cut, b * cut) for a, b in first.iid_spans)
    late = tuple((cut + a * tau, cut + b * tau) for a, b in second.iid_spans)
    return Schedule(weights, iid_spans=early + late)


def warmup_then_random(tau: float = 0.15, sigma: float = 0.08) -> Schedule:
    """From low to high within the first tau of the run (0 < tau < 1), on an even tau-share of each bin; then random.

    The one use of order for which gains on held-out loss are published (arXiv 2506.11300).

    >>> warmup_then_random(0.5, sigma=0).weights(np.array([0.0, 0.499999, 0.5, 1.0]), 2).round(3)
    array([[1. , 0. ],
           [0. , 1. ],
           [0.5, 0.5],
           [0.5, 0.5]])
    """
    return then(increasing(sigma), random(), 1 - check_range("tau", tau, 0, 1, open_ends=True))


def random_then_anneal(tau: float = 0.2, direction: Literal["up", "down"] = "up", sigma: float = 0.08) -> Schedule:
    """Random; in the last tau of the run (0 < tau < 1) from low to high (up) or from high to low (down).

    Mid-training by order alone: the late, well-remembered tokens are chosen by rank, none is used twice.

    >>> random_then_anneal(0.5, "down", sigma=0).weights(np.array([0.0, 0.499999, 0.5, 1.0]), 2).round(3)
    array([[0.5, 0.5],
           [0.5, 0.5],
           [0. , 1. ],
           [1. , 0. ]])
    """
    return then(random(), {"up": increasing, "down": decreasing}[direction](sigma), tau)


def reverse(schedule: Schedule) -> Schedule:
    """The same backwards: weights at 1 - t. The control for direction. As an expression, twice is not at all.

    >>> reverse(warmup_then_random(0.25)).iid_spans
    ((0.0, 0.75),)
    """
    if schedule.stock:
        raise InputError("stock leaves a corpus as it lies: it has no reverse")
    if schedule.adaptive:
        raise InputError("adaptive finds its weights as it goes: there is no reverse before a run, only of its replay")
    spans = tuple((1 - b, 1 - a) for a, b in reversed(schedule.iid_spans))
    return replace(schedule, weights=lambda t_T, num_bins: schedule.weights(1 - t_T, num_bins), iid_spans=spans)


def placebo(schedule: Schedule) -> Schedule:
    """The same schedule over bins whose segments were dealt by chance: keeps quotas and mechanics, no meaning.

    >>> placebo(random()).placebo
    True
    """
    if schedule.stock:
        raise InputError("stock leaves a corpus as it lies, whatever the bins: it has no placebo")
    return replace(schedule, placebo=True)


# ----------------------------------------------------------------------------------------------------------------------
# As the run learns


def adaptive(
    reward: Literal["progress"] = "progress", eta: float = 0.5, share: float = 0.1, floor: float = 0.25
) -> Schedule:
    """Left to the run: more of the bins whose validation loss falls fastest; `curriculum/adaptive.py` has the rule.

    eta (0 to 100) is how strongly progress counts, share (0 to 1) how much of it is forgotten at each validation, floor
    (0 < floor <= 1) the least share of a bin over its share of the tokens. Until something is known: `stratified`.

    >>> adaptive().weights(np.array([0.0, 1.0]), 2), adaptive().adaptive
    (array([[0.5, 0.5],
           [0.5, 0.5]]), {'eta': 0.5, 'share': 0.1, 'floor': 0.25})
    """
    check_range("eta", eta, 0, 100)
    check_range("share", share, 0, 1)
    check_range("floor", floor, 0, 1, open_low=True)
    return Schedule(uniform, adaptive=dict(eta=eta, share=share, floor=floor))


# ----------------------------------------------------------------------------------------------------------------------
# Your own


def custom(target: str, sha256: str = "") -> Schedule:
    """Your function, "module:function": f(t_T, num_bins) -> weights (T, B), non-negative; rows are then normalised.

    The one place where an expression runs code, and it is the code you name. `sha256` (its first 16 digits) is of the
    module's source and is filled in: an edited file is another schedule, and one written down is refused once its file
    has changed. Modules that yours imports are not watched.

    >>> custom("curriculum.schedules:uniform").weights(np.array([0.0]), 2)
    array([[0.5, 0.5]])
    """
    if sha256 not in ("", found := source_digest(target)):
        raise InputError(f"custom schedule {target!r}: its source has changed, from {sha256} to {found}")
    module, name = target.split(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise InputError(f"custom schedule {target!r}: importing {module} failed: {error!r}") from error
    if not callable(function):
        raise InputError(f"custom schedule {target!r}: {module} has no function {name}")

    def weights(t_T, num_bins):
        try:
            weights_TB = np.asarray(function(t_T.copy(), num_bins), dtype=float)
        except Exception as error:
            raise InputError(f"custom schedule {target!r}: called with {num_bins} bins it raised {error!r}") from error
        if weights_TB.shape != (len(t_T), num_bins):
            raise InputError(
                f"custom schedule {target!r}: returned shape {weights_TB.shape}, expected {(len(t_T), num_bins)}: "
                "a row for each moment, a column for each bin"
            )
        with np.errstate(over="ignore"):
            total_T = weights_TB.sum(1)
        faults = {
            "NaN or infinite": ~np.isfinite(weights_TB).all(1),
            "negative": (weights_TB < 0).any(1),
            "all zero": ~(weights_TB > 0).any(1),
            "too large to add up": ~np.isfinite(total_T),
        }
        for fault, bad_T in faults.items():
            if bad_T.any():
                raise InputError(
                    f"custom schedule {target!r}: weights at progress {t_T[np.argmax(bad_T)]:.4g} are {fault}; "
                    "expected numbers of at least 0, in each row one above 0"
                )
        return weights_TB / total_T[:, None]

    return Schedule(weights)


def source_digest(target: str) -> str:
    """First 16 hex digits of the SHA-256 of the file that "module:function" lives in; it is not run for that."""
    module, colon, name = target.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), name]):
        raise InputError(f'custom schedule {target!r}: expected "module:function", e.g. custom("mine.schedules:waves")')
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    except Exception as error:  # a package around it was run, and failed
        raise InputError(f"custom schedule {target!r}: importing {module} failed: {error!r}") from error
    if spec is None or not spec.has_location or spec.origin is None:
        raise InputError(f"custom schedule {target!r}: no module {module} with a file in {Path.cwd()} or installed")
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]


FAMILIES: dict[str, Callable[..., Schedule]] = {
    f.__name__: f
    for f in (
        *(random, stratified, stock),
        *(increasing, decreasing, v, inverted_v, fold, zigzag, trend_cycle),
        *(copula, pacing, mid_out, outside_in, tilt),
        *(discrete, sequential, incremental, hybrid),
        *(then, warmup_then_random, random_then_anneal, reverse, placebo),
        *(adaptive, custom),
    )
}


# ----------------------------------------------------------------------------------------------------------------------
# From text to a schedule, by way of a tree that can be spelled out and simplified

EXAMPLE = "then(fold(5), random, tau=0.2)"


class Call(NamedTuple):
    """A family and all its arguments: numbers, words, lists, and other calls."""

    name: str
    arguments: dict[str, Any]


def parse(text: str) -> Schedule:
    """A schedule from its expression. Raises InputError on unknown names or arguments, listing the known ones.

    >>> parse("reverse(reverse(fold(3)))").text
    'fold(K=3, sigma=0.08)'
    """
    tree = read_expression(text, "schedule", f"fold(5) or {EXAMPLE}", most_characters=10_000)
    if not isinstance(tree, ast.Name | ast.Call):
        raise InputError(f"schedule {text!r} is not a schedule; write e.g. fold(5) or {EXAMPLE}")
    try:
        return make(read(tree, Schedule))
    except Misread as error:
        raise InputError(f"schedule {text!r}: {error}") from None


class Misread(Exception):
    """What is wrong within an expression; `parse` adds the whole of it."""


def read(node: ast.expr, kind: Any) -> Any:
    """What the node says, as the `kind` that the parameter's annotation asks for."""
    match node:
        case ast.Name(id=word) | ast.Constant(value=str() as word) if get_origin(kind) is Literal:
            if word in get_args(kind):
                return word
        case ast.Constant(value=str() as word) if kind is str:
            return word
        case ast.List(elts=items) | ast.Tuple(elts=items) if get_origin(kind) is list:
            return [read(item, *get_args(kind)) for item in items]
        case ast.Tuple(elts=items) | ast.List(elts=items) if get_origin(kind) is tuple:
            if len(items) == len(get_args(kind)):
                return tuple(read(item, part) for item, part in zip(items, get_args(kind), strict=True))
        case ast.Name(id=name) if kind is Schedule:
            return read_call(name, [], [])
        case ast.Call(func=ast.Name(id=name), args=positional, keywords=named) if kind is Schedule:
            return read_call(name, positional, named)
        case _ if kind in (int, float) and (value := literal(node)) is not None:
            return value if kind is int else float(value) + 0.0  # + 0.0: minus zero is zero
    raise Misread(f"{ast.unparse(node)!r} is not {worded(kind)}")


def read_call(name: str, positional: list[ast.expr], named: list[ast.keyword]) -> Call:
    if name not in FAMILIES:
        raise Misread(f"unknown name {name!r}; known are {', '.join(FAMILIES)}")
    signature = inspect.signature(FAMILIES[name])
    known_as = f"it is {name}{readable(signature)}"
    try:
        bound = signature.bind(*positional, **{keyword.arg: keyword.value for keyword in named})
    except TypeError as error:
        raise Misread(f"{name}: {error}; {known_as}") from None
    for parameter, node in bound.arguments.items():
        kind = signature.parameters[parameter].annotation
        try:
            bound.arguments[parameter] = read(node, kind)
        except Misread:
            if kind is Schedule and isinstance(node, ast.Name | ast.Call):
                raise  # a fault further in, told there
            raise Misread(
                f"{name}: {parameter} must be {worded(kind)}, not {ast.unparse(node)!r}; {known_as}"
            ) from None
    bound.apply_defaults()
    return simplified(Call(name, dict(bound.arguments)))


def simplified(call: Call) -> Call:
    """One way to write what can be written in several; `custom` gets the hash of its source."""
    match call:
        case Call("reverse", {"schedule": Call("reverse", {"schedule": inner})}):
            return inner
        case Call("reverse", {"schedule": Call("random" | "stratified") as inner}):
            return inner
        case Call("reverse", {"schedule": Call("placebo", {"schedule": inner})}):
            return Call("placebo", {"schedule": simplified(Call("reverse", {"schedule": inner}))})
        case Call("placebo", {"schedule": Call("placebo") as inner}):
            return inner
        case Call("custom", {"target": target, "sha256": ""}):
            return Call("custom", {"target": target, "sha256": source_digest(target)})
    return call


def make(call: Call) -> Schedule:
    arguments = {name: make(value) if isinstance(value, Call) else value for name, value in call.arguments.items()}
    return replace(FAMILIES[call.name](**arguments), text=spelled(call))


def spelled(call: Call) -> str:
    """The expression with every argument by name; parsed, it is the same again."""
    kinds = {p.name: p.annotation for p in inspect.signature(FAMILIES[call.name]).parameters.values()}
    shown = [
        f"{name}={spelled(value) if isinstance(value, Call) else value if is_word(kinds[name]) else repr(value)}"
        for name, value in call.arguments.items()
    ]
    return f"{call.name}({', '.join(shown)})" if shown else call.name


def is_word(kind: Any) -> bool:
    return get_origin(kind) is Literal


def worded(kind: Any) -> str:
    """
    >>> worded(float), worded(Schedule), worded(Literal["up", "down"])
    ('a number', 'a schedule', 'up or down')
    """
    if is_word(kind):
        return " or ".join(get_args(kind))
    known = {Schedule: "a schedule", str: "a quoted text", int: "a number", float: "a number"}
    return known.get(kind, "a list [(until, [weight, ...]), ...]")


def readable(signature: inspect.Signature) -> str:
    """`(K=5, sigma=0.08)`: parameters and defaults without their types."""
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in signature.parameters.values()]
    return f"({', '.join(shown)})"


def check_range(
    name: str, value: float, low: float, high: float, *, open_ends: bool = False, open_low: bool = False
) -> float:
    if not low <= value <= high or (value == low and (open_ends or open_low)) or (value == high and open_ends):
        between = f"strictly between {low} and {high}" if open_ends else f"from {low} to {high}"
        between = f"above {low}, up to {high}" if open_low else between
        raise InputError(f"schedule: {name} = {value} is out of range: expected {between}")
    return value


def check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or not 1 <= value <= 10_000:
        raise InputError(f"schedule: {name} = {value} is out of range: expected a whole number from 1 to 10000")
