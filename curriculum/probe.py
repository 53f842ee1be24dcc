"""Statistics of the transfer probe: would another mixture of bins be learned from faster than an i.i.d. one, now?

From one checkpoint, short branches are trained on each bin alone and on the i.i.d. mix of all bins, several times with
fresh segments. `drop` is how far a branch lowers a validation loss (nats). NumPy in, NumPy out.

**A mixture** pi (shares of the bins, sum 1) was not run; its drop is read off the branches that were, by

    drop(pi) = sum_b pi_b drop_b + curvature (1 - sum_b pi_b^2) / (1 - 1/B),    curvature = drop_mix - mean_b drop_b

which is what was measured at every bin and at the mix, and between them says that variety is worth the same whichever
bins it is of (repeating one kind of text has diminishing returns: curvature > 0). Its maximum over all mixtures is the
projection of drop_b / (2 curvature / (1 - 1/B)) on the simplex. What a mixture gains over the mix is linear in the
measured drops, so its error is known.

**The verdict** on a point of training:

    yes      a mixture chosen on one half of the seeds beats the mix on the other half: the lower end of the one-sided
             95 % interval is above 0. Choosing and judging share no data: where no mixture is better, this is said
             about once in 20 times (tests/test_probe.py).
    no       the best mixture and every single bin, judged by all seeds, those they were chosen by as well, which
             flatters them: even the highest upper end of their intervals is below `least` of the mix's own drop.
    unclear  neither: more seeds or longer branches are needed.

**What "no" means**: no constant mixture of these bins makes the next few tokens count for more than `least` more, at
this learning rate, as far as branches of this length and the formula above can tell. Benefits that show only later
(a curriculum's promise) and other bins (another measure, finer or coarser) are not excluded.

An exact order uses every bin up sooner or later, so a bin that is better at all times alike is of no use to it: what it
needs is that the bins' worth *changes*. `p_constant` tests whether it does, over the points that were probed.

R seeds   A branches: B bins and, last, the mix   V validation bins
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

CONFIDENCE = 0.95
LEAST = 0.05  # of the mix's drop: what is worth a schedule


class Gain(NamedTuple):
    """What a mixture gains over the i.i.d. mix, in nats, with the ends of its one-sided intervals."""

    mixture_B: np.ndarray
    nats: float
    low: float
    high: float


class Verdict(NamedTuple):
    answer: Literal["yes", "no", "unclear"]
    judged: Gain  # chosen on even seeds, judged on odd ones
    flattered: Gain  # of the best mixture and the single bins, judged on all seeds: the one that may gain most
    mix_nats: float  # the mix's own drop
    least_nats: float  # what would have been worth having


def means(drop_RAV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The matrix G (A, V) and its standard errors: mean over seeds, and sd / sqrt(R)."""
    return drop_RAV.mean(0), drop_RAV.std(0, ddof=1) / np.sqrt(len(drop_RAV))


def best_mixture(drop_A: np.ndarray) -> np.ndarray:
    """Shares of the B bins at which the formula above has its maximum.

    >>> best_mixture(np.array([1.0, 1.0, 2.0])), best_mixture(np.array([3.0, 1.0, 1.0]))
    (array([0.5, 0.5]), array([1., 0.]))
    """
    bins_B, num_bins = drop_A[:-1], len(drop_A) - 1
    curvature = (drop_A[-1] - bins_B.mean()) / (1 - 1 / num_bins)
    if curvature <= 0:  # variety is worth nothing: the best bin alone
        return np.eye(num_bins)[np.argmax(bins_B)]
    return on_simplex(bins_B / (2 * curvature))


def on_simplex(x_B: np.ndarray) -> np.ndarray:
    """The nearest point whose coordinates are non-negative and sum to 1.

    >>> on_simplex(np.array([0.5, 0.7])), on_simplex(np.array([3.0, 0.0, 0.0]))
    (array([0.4, 0.6]), array([1., 0., 0.]))
    """
    falling_B = np.sort(x_B)[::-1]
    level_B = (np.cumsum(falling_B) - 1) / np.arange(1, len(x_B) + 1)
    kept = np.count_nonzero(falling_B > level_B)
    return np.maximum(x_B - level_B[kept - 1], 0)


def contrast(mixture_B: np.ndarray) -> np.ndarray:
    """Coefficients (A,) of the measured drops whose sum is what the mixture gains over the mix.

    >>> contrast(np.array([0.5, 0.5])), contrast(np.array([1.0, 0.0]))
    (array([0., 0., 0.]), array([ 1.,  0., -1.]))
    """
    num_bins = len(mixture_B)
    variety = (1 - (mixture_B**2).sum()) / (1 - 1 / num_bins)
    return np.append(mixture_B - variety / num_bins, variety - 1)


def gain(mixture_B: np.ndarray, judging_RA: np.ndarray, variance_A: np.ndarray, seeds: int) -> Gain:
    """Of a mixture, by these seeds; the branches' variances (A,) come from `seeds` of them.

    Branches differ in spread (long documents, rare texts), so the interval has Satterthwaite's degrees of freedom.
    """
    from scipy.special import stdtrit  # quantiles of t

    coefficient_A = contrast(mixture_B)
    nats = float(coefficient_A @ judging_RA.mean(0))
    part_A = coefficient_A**2 * variance_A / len(judging_RA)
    if not part_A.sum() > 0:  # the mix itself, or no spread at all
        return Gain(mixture_B, nats, nats, nats)
    freedom = part_A.sum() ** 2 / (part_A**2 / (seeds - 1)).sum()
    width = float(stdtrit(freedom, CONFIDENCE) * np.sqrt(part_A.sum()))
    return Gain(mixture_B, nats, nats - width, nats + width)


def judge(drop_RA: np.ndarray, least: float = LEAST) -> Verdict:
    """The verdict on one point of training, from the drops of the whole validation loss; at least 4 seeds."""
    seeds = len(drop_RA)
    assert seeds >= 4 and drop_RA.shape[1] >= 3, "two seeds to choose by, two to judge by, two bins and the mix"
    variance_A = drop_RA.var(0, ddof=1)
    judged = gain(best_mixture(drop_RA[0::2].mean(0)), drop_RA[1::2], variance_A, seeds)
    tried = [best_mixture(drop_RA.mean(0)), *np.eye(drop_RA.shape[1] - 1)]
    flattered = max((gain(mixture_B, drop_RA, variance_A, seeds) for mixture_B in tried), key=lambda g: g.high)
    mix_nats = float(drop_RA[:, -1].mean())
    least_nats = least * abs(mix_nats)
    answer = "yes" if judged.low > 0 else "no" if flattered.high < least_nats else "unclear"
    return Verdict(answer, judged, flattered, mix_nats, least_nats)


def p_constant(drops: Sequence[np.ndarray]) -> float:
    """The chance of worths that change so much between points of training, if they did not. Each (R, A), two or more.

    A bin's worth at a point is its drop less the mean over bins there. The losses of early points are noisier, so
    this is Brown and Forsythe's F with Mehrotra's degrees of freedom: no weights that would have to be estimated.
    """
    from scipy.special import fdtrc  # upper tail of F

    bins = [drop_RA[:, :-1] for drop_RA in drops]
    worth_PB = np.array([drop_RB.mean(0) - drop_RB.mean() for drop_RB in bins])
    error_P = np.array([drop_RB.var(0, ddof=1).mean() / len(drop_RB) for drop_RB in bins])
    freedom_P = np.array([drop_RB.size - drop_RB.shape[1] for drop_RB in bins])
    num_points, num_bins = worth_PB.shape
    differing = (num_bins - 1) * (1 - 1 / num_points) * error_P.sum()  # expected of the sum below, were worths constant
    ratio = ((worth_PB - worth_PB.mean(0)) ** 2).sum() / differing
    mean, square = error_P.mean(), (error_P**2).sum()
    above = (num_bins - 1) * ((num_points - 1) * mean) ** 2 / (square * (1 - 2 / num_points) + mean**2)
    below = error_P.sum() ** 2 / (error_P**2 / freedom_P).sum()
    return float(fdtrc(above, below, ratio))
