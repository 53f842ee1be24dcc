"""Bins: segments sorted by a measure and cut into slices of equal tokens. Pure functions, NumPy in, NumPy out.

    N segments   S bins of any kind   F boundaries between bins

A *layout* says how. One measure is cut into `bins` slices. With two measures every slice of the first is cut again by
the second, so that within a slice of the first all slices of the second hold equal tokens: a schedule along one of
them leaves the other alone (`axis` says along which). `hold_extremes` sets the tokens at either end of the measure
apart in two bins of their own, which no schedule puts first or last: a measure's tails are where the junk gathers.

A bin's number grows with the measure; bin i of the first measure and j of the second is i * second_bins + j.

Beyond memory: edges need no sort. `radix_edges` finds them in two additive passes over pieces of any size (machines
add up their histograms), equal to those of a sort; every segment's bin then follows from its value alone.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from data.cli import InputError

MOST_BINS = 1024
HELD_SPAN = (0.1, 0.9)  # progress within which held extremes are spread


class Layout(NamedTuple):
    bins: int = 16
    second_bins: int = 1
    axis: int = 1
    hold_extremes: float = 0.0

    @property
    def num_bins(self) -> int:
        return (self.bins + 2 * bool(self.hold_extremes)) * self.second_bins

    @property
    def held_bins(self) -> tuple[int, ...]:
        return (0, self.num_bins - 1) if self.hold_extremes else ()

    @property
    def boundaries_F(self) -> np.ndarray:
        """Token-mass quantiles of the first measure between its bins."""
        held = self.hold_extremes
        inner = held + (1 - 2 * held) * np.arange(self.bins + 1) / self.bins
        return inner if held else inner[1:-1]

    @property
    def mass_S(self) -> np.ndarray:
        """Share of the tokens in each bin, were they cut to the token: (S,), sum 1."""
        mass = np.diff(self.boundaries_F, prepend=0.0, append=1.0)
        return np.repeat(mass, self.second_bins) / self.second_bins

    def check(self, num_measures: int) -> None:
        """Raises InputError on what cannot be laid out."""
        if min(self.bins, self.second_bins) < 1 or self.num_bins > MOST_BINS:
            times = f" x {self.second_bins}" if self.second_bins != 1 else ""
            raise InputError(f"bins = {self.bins}{times}: expected 1 to {MOST_BINS}, extremes held apart included")
        if not 0 <= self.hold_extremes < 0.5:
            raise InputError(f"--hold-extremes {self.hold_extremes}: expected a share from 0 to below 0.5, e.g. 0.02")
        if self.axis not in (1, 2):
            raise InputError(f"--axis {self.axis}: expected 1 or 2, the measure along which the schedule runs")
        if (self.second_bins > 1) != (num_measures == 2) or num_measures > 2 or self.axis > num_measures:
            raise InputError(
                f"{num_measures} measures, --second-bins {self.second_bins}, --axis {self.axis}: two measures are "
                'written "entropy x surprise_gap" and need --second-bins above 1; more than two cannot be laid out'
            )
        if self.hold_extremes and num_measures == 2:
            raise InputError(f"--hold-extremes {self.hold_extremes}: goes with one measure, not with two")

    def weights(self, schedule: Callable[[np.ndarray, int], np.ndarray], progress_G: np.ndarray) -> np.ndarray:
        """What a schedule along this layout's axis wants of all bins: (G, S), rows summing to 1."""
        along = self.bins if self.axis == 1 else self.second_bins
        wish_GB = schedule(progress_G, along)
        if self.hold_extremes:
            first, last = HELD_SPAN
            inside_G = (progress_G > first) & (progress_G < last)
            tail_G1 = np.where(inside_G, self.hold_extremes / (last - first), 0.0)[:, None]
            return np.hstack([tail_G1, wish_GB * (1 - 2 * tail_G1), tail_G1])
        if self.axis == 1:
            return np.repeat(wish_GB, self.second_bins, axis=1) / self.second_bins
        return np.tile(wish_GB, self.bins) / self.bins


class Bins(NamedTuple):
    """Segments laid out bin after bin: bin b holds places `cut[b]` to `cut[b + 1]` of the arrays (N,)."""

    id_N: np.ndarray  # position of the segment in the arrays that were sorted
    length_N: np.ndarray
    rank_N: np.ndarray  # float32: token-mass quantile in (0, 1) of its middle, by the (first) measure
    cut: np.ndarray  # (S + 1,)
    edges_F: np.ndarray  # value of the first measure from which on a segment belongs to the next bin
    second_edges: np.ndarray  # (bins, second_bins - 1): of the second measure, within each bin of the first

    @property
    def tokens_S(self) -> np.ndarray:
        return np.add.reduceat(self.length_N, self.cut[:-1], dtype=np.int64)

    @property
    def bin_N(self) -> np.ndarray:
        """The bin of every segment, int16, in the sequence of the arrays that were sorted."""
        bin_N = np.empty(len(self.id_N), np.int16)
        bin_N[self.id_N] = np.repeat(np.arange(len(self.cut) - 1, dtype=np.int16), np.diff(self.cut))
        return bin_N


def cut_bins(values: list[np.ndarray], length_N: np.ndarray, layout: Layout) -> Bins:
    """Segments in bins of equal tokens within one segment; ties go by id.

    `values` holds an array (N,) of finite numbers for each measure. Raises InputError if a bin would be empty.
    """
    id_N = sort_by(values[0])
    length_N = length_N[id_N]
    end_N = np.cumsum(length_N, dtype=np.int64)
    rank_N = ((end_N - length_N / 2) / end_N[-1]).astype(np.float32)
    cut = cut_at(end_N, layout.boundaries_F)
    edges_F = values[0][id_N[cut[1:-1].clip(max=len(id_N) - 1)]]
    second_edges = np.empty((layout.bins, layout.second_bins - 1))
    if layout.second_bins > 1:
        fractions, pieces = np.arange(1, layout.second_bins) / layout.second_bins, [cut[:1]]
        check_filled(cut, layout)
        for i, (begin, end) in enumerate(zip(cut[:-1], cut[1:], strict=True)):
            inside = begin + sort_by(values[1][id_N[begin:end]])
            for array in (id_N, length_N, rank_N):
                array[begin:end] = array[inside]
            inner = begin + cut_at(np.cumsum(length_N[begin:end], dtype=np.int64), fractions)
            pieces.append(inner[1:])
            second_edges[i] = values[1][id_N[inner[1:-1].clip(max=end - 1)]]
        cut = np.concatenate(pieces)
    check_filled(cut, layout)
    return Bins(id_N, length_N, rank_N, cut, edges_F, second_edges)


def deal_bins(real: Bins, layout: Layout, rng: np.random.Generator) -> Bins:
    """A placebo's bins: of segments in chance order, cut where the tokens of the real bins end."""
    dealt_N = rng.permutation(len(real.id_N))
    end_N = np.cumsum(real.length_N[dealt_N], dtype=np.int64)
    cut = cut_at(end_N, np.cumsum(real.tokens_S)[:-1] / end_N[-1])
    check_filled(cut, layout)
    arrays = (array[dealt_N] for array in real[:3])
    return Bins(*arrays, cut, real.edges_F, real.second_edges)


def cut_at(end_N: np.ndarray, fractions_F: np.ndarray) -> np.ndarray:
    """Where sorted segments, ending at tokens `end_N`, are cut at shares of their tokens: (F + 2,) places, 0 and N too.

    The segment that reaches beyond a boundary opens the next bin: then a bin's least value does not depend on how
    ties are sorted, and edges can be found without sorting.

    >>> cut_at(np.array([2, 4, 7, 8]), np.array([0.5]))
    array([0, 2, 4])
    """
    inner = np.searchsorted(end_N, limits(fractions_F, end_N[-1]), side="right")
    return np.concatenate([[0], inner, [len(end_N)]]).astype(np.int64)


def limits(fractions_F: np.ndarray, num_tokens: int) -> np.ndarray:
    """Shares of the tokens as token counts. Nudged by a few roundings: a boundary meant at token 30 is not at 29.9."""
    return np.asarray(fractions_F) * float(num_tokens) * (1 + 1e-15)


def check_filled(cut: np.ndarray, layout: Layout) -> None:
    if len(empty := np.flatnonzero(np.diff(cut) == 0)):
        raise InputError(
            f"bins = {layout.num_bins}: bin {empty[0]} would hold no segment "
            "(a bin's share of tokens is smaller than one segment): use fewer bins"
        )


def place(values: list[np.ndarray], edges_F: np.ndarray, second_edges: np.ndarray) -> np.ndarray:
    """The bin, int16 (V,), of segments that were not sorted with the others, by the edges between bins."""
    bin_V = np.searchsorted(edges_F, values[0], side="right")
    if second_edges.size:
        inner_V = (values[1][:, None] >= second_edges[bin_V]).sum(1)
        bin_V = bin_V * (second_edges.shape[1] + 1) + inner_V
    return bin_V.astype(np.int16)


# ----------------------------------------------------------------------------------------------------------------------
# Sorting


def sort_by(values_N: np.ndarray) -> np.ndarray:
    """Positions that sort the values, ties by position; int32 or int64. No value may be NaN.

    The upper half of a uint64 holds the value rounded to float32, the lower half its position: one sort of plain
    integers, which NumPy does with vector instructions, several times faster than argsort. Where distinct float64
    values round to the same float32, those few are sorted once more.

    >>> sort_by(np.array([0.5, -1.0, 0.5, 0.0]))
    array([1, 3, 0, 2], dtype=int32)
    """
    num = len(values_N)
    assert num < 1 << 32, "positions take 32 bits"
    rounded_N = values_N.astype(np.float32)
    key_N = float_bits(rounded_N).astype(np.uint64)
    key_N <<= np.uint64(32)
    key_N |= np.arange(num, dtype=np.uint64)
    key_N.sort()
    by_value_N = (key_N & np.uint64(0xFFFFFFFF)).astype(np.int32 if num < 1 << 31 else np.int64)
    if values_N.dtype == np.float32:
        return by_value_N
    key_N >>= np.uint64(32)
    level_N = key_N[1:] == key_N[:-1]  # with the one before
    if not level_N.any():
        return by_value_N
    value_N = values_N[by_value_N]
    if np.any(level_N & (value_N[1:] != value_N[:-1])):
        among_N = np.append(level_N, False)
        among_N[1:] |= level_N
        at = np.flatnonzero(among_N)
        by_value_N[at] = by_value_N[at][np.lexsort((by_value_N[at], value_N[at], key_N[at]))]
    return by_value_N


def float_bits(values_N: np.ndarray) -> np.ndarray:
    """Unsigned integers (N,) in the order of the float32 values; -0 and 0 are alike."""
    bits_N = (values_N + np.float32(0)).view(np.int32)
    flip_N = bits_N >> 31  # all bits of a negative number, the sign of others
    flip_N |= np.int32(-(1 << 31))
    flip_N ^= bits_N
    return flip_N.view(np.uint32)


def floats_of(bits_F: np.ndarray) -> np.ndarray:
    """The float32 values of `float_bits`.

    >>> floats_of(float_bits(np.float32([-1.5, 0.0, 7.25])))
    array([-1.5 ,  0.  ,  7.25], dtype=float32)
    """
    bits_F = np.asarray(bits_F, np.uint32)
    return (bits_F ^ np.where(bits_F >> 31, np.uint32(0x80000000), np.uint32(0xFFFFFFFF))).view(np.float32)


Pieces = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]


def radix_edges(pieces: Pieces, fractions_F: np.ndarray) -> np.ndarray:
    """Edges (F,), float32, between bins of given shares of the tokens, without sorting and in constant memory.

    `pieces()` yields (float32 values, lengths) of any number of segments, twice the same. The first pass adds up the
    tokens of every upper half of the value's 32 bits, the second those of every lower half within the few upper ones
    that hold an edge. Counts are integers and only added: pieces may be counted anywhere, in any order.
    """
    high_H = np.zeros(1 << 16, np.int64)
    for values, lengths in pieces():
        high_H += tokens_at(float_bits(values) >> 16, lengths)
    end_H = np.cumsum(high_H)
    limit_F = limits(fractions_F, end_H[-1])
    upper_F = np.searchsorted(end_H, limit_F, side="right").clip(max=np.flatnonzero(high_H)[-1])
    wanted_U, which_F = np.unique(upper_F, return_inverse=True)
    low_UH = np.zeros((len(wanted_U), 1 << 16), np.int64)
    for values, lengths in pieces():
        bits = float_bits(values)
        at = np.searchsorted(wanted_U, bits >> 16).clip(max=len(wanted_U) - 1)
        for u in range(len(wanted_U)):
            inside = (at == u) & (bits >> 16 == wanted_U[u])
            low_UH[u] += tokens_at(bits[inside] & 0xFFFF, lengths[inside])
    edges = np.empty(len(upper_F), np.uint32)
    for f, (upper, u) in enumerate(zip(upper_F, which_F, strict=True)):
        end = end_H[upper] - high_H[upper] + np.cumsum(low_UH[u])
        lower = np.searchsorted(end, limit_F[f], side="right").clip(max=np.flatnonzero(low_UH[u])[-1])
        edges[f] = upper << 16 | lower
    return floats_of(edges)


def tokens_at(half: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tokens at each of 65,536 values of half a word, int64: float64 sums of whole numbers are exact up to 2^53."""
    return np.bincount(half, weights=lengths, minlength=1 << 16).astype(np.int64)
