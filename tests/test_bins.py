"""Bins: sorted as a sort sorts, cut where the tokens say, also without a sort; grids, held extremes, placebos."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.bins import (
    HELD_SPAN,
    Layout,
    cut_at,
    cut_bins,
    deal_bins,
    float_bits,
    floats_of,
    place,
    radix_edges,
    sort_by,
)
from curriculum.schedules import parse
from data.cli import InputError

FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


def corpus_of(num_segments: int, seed: int = 0):
    """Two measures, the first of few levels and the second correlated with it, and lengths from 1 to 64."""
    rng = np.random.default_rng(seed)
    first_N = rng.integers(-20, 20, num_segments) / 4
    return [first_N, first_N + rng.normal(size=num_segments)], rng.integers(1, 65, num_segments).astype(np.int32)


# -- Sorting


@given(st.lists(st.one_of(FLOATS, st.sampled_from([0.0, -0.0, 1.0, 1.0 + 1e-12, 1.0 - 1e-12])), max_size=60))
def test_sorting_is_that_of_values_then_positions(values):
    """Also of float64 values that float32 cannot tell apart."""
    values_N = np.array(values, np.float64)
    expected = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert sort_by(values_N).tolist() == expected
    assert sort_by(values_N.astype(np.float32)).tolist() == sorted(
        range(len(values)), key=lambda i: (np.float32(values[i]), i)
    )


@given(st.lists(FLOATS, min_size=2, max_size=50))
def test_float_bits_keep_the_order_and_lead_back(values):
    values_N = np.array(values, np.float32)
    bits_N = float_bits(values_N)
    for i in range(len(values) - 1):
        assert (values_N[i] < values_N[i + 1]) == (bits_N[i] < bits_N[i + 1])
    assert np.array_equal(floats_of(bits_N), values_N)


# -- Edges without a sort


@given(st.integers(0, 10**6), st.integers(1, 400), st.integers(2, 40), st.sampled_from(["normal", "tied", "tiny"]))
def test_radix_edges_are_those_of_a_sort(seed, num_segments, num_bins, kind):
    """Whatever the pieces; also among ties and values that share their upper bits."""
    rng = np.random.default_rng(seed)
    values_N = rng.normal(size=num_segments) * 10.0 ** rng.integers(-3, 4)
    if kind == "tied":
        values_N = np.round(rng.normal(size=num_segments))
    elif kind == "tiny":
        values_N = 1 + rng.integers(-50, 50, num_segments) * 2.0**-23
    values_N, length_N = values_N.astype(np.float32), rng.integers(1, 1025, num_segments)
    fractions = np.arange(1, num_bins) / num_bins
    pieces = np.array_split(np.arange(num_segments), rng.integers(1, 6))
    found = radix_edges(lambda: ((values_N[p], length_N[p]) for p in pieces), fractions)
    by_value_N = sort_by(values_N)
    cut = cut_at(np.cumsum(length_N[by_value_N]), fractions)[1:-1]
    assert found.tolist() == values_N[by_value_N[cut.clip(max=num_segments - 1)]].tolist()


# -- Layouts


@pytest.mark.parametrize("layout", [Layout(7), Layout(4, 3), Layout(5, hold_extremes=0.05), Layout(1)])
def test_bins_tile_the_segments_in_equal_tokens(layout):
    values, length_N = corpus_of(3000)
    values = values[: 1 + (layout.second_bins > 1)]
    bins = cut_bins(values, length_N, layout)
    assert sorted(bins.id_N.tolist()) == list(range(3000))
    assert bins.length_N.tolist() == length_N[bins.id_N].tolist()
    shares = np.full(layout.num_bins, 1 / layout.num_bins)
    if held := layout.hold_extremes:
        shares = np.array([held, *[(1 - 2 * held) / layout.bins] * layout.bins, held])
    assert np.abs(bins.tokens_S - shares * length_N.sum()).max() <= 2 * length_N.max()
    # Ranks are quantiles of the first measure, whatever the bins.
    by_value_N = np.argsort(values[0], kind="stable")
    end_N = np.cumsum(length_N[by_value_N])
    expected_N = np.empty(3000)
    expected_N[by_value_N] = (end_N - length_N[by_value_N] / 2) / end_N[-1]
    np.testing.assert_allclose(bins.rank_N, expected_N[bins.id_N], atol=1e-6)


def test_a_grid_sorts_within_each_bin_of_the_first_measure():
    values, length_N = corpus_of(3000)
    bins = cut_bins(values, length_N, Layout(4, 3))
    alone = cut_bins(values[:1], length_N, Layout(4))
    assert (bins.bin_N // 3).tolist() == alone.bin_N.tolist()
    for i in range(4):
        cells = [values[1][bins.bin_N == 3 * i + j] for j in range(3)]
        assert cells[0].max() <= cells[1].min() and cells[1].max() <= cells[2].min()


def test_segments_are_placed_by_the_edges_as_they_were_sorted():
    values = [np.random.default_rng(s).normal(size=2000) for s in (0, 1)]
    length_N = np.random.default_rng(2).integers(1, 65, 2000)
    for layout, used in ((Layout(8), values[:1]), (Layout(4, 5), values), (Layout(6, hold_extremes=0.1), values[:1])):
        bins = cut_bins(used, length_N, layout)
        assert place(used, bins.edges_F, bins.second_edges).tolist() == bins.bin_N.tolist()


@pytest.mark.parametrize("axis", [1, 2])
def test_a_schedule_along_one_axis_leaves_the_other_even(axis):
    layout, progress_G = Layout(4, 3, axis), np.linspace(0.01, 0.99, 50)
    weights_GS = layout.weights(parse("increasing").weights, progress_G).reshape(50, 4, 3)
    np.testing.assert_allclose(weights_GS.sum((1, 2)), 1)
    other = weights_GS.sum(axis)
    np.testing.assert_allclose(other, 1 / other.shape[1])
    along = weights_GS.sum(3 - axis)
    np.testing.assert_allclose(along, parse("increasing").weights(progress_G, layout[axis - 1]))


def test_held_extremes_come_neither_first_nor_last():
    layout, progress_G = Layout(4, hold_extremes=0.02), np.linspace(0.001, 0.999, 999)
    weights_GS = layout.weights(parse("increasing").weights, progress_G)
    np.testing.assert_allclose(weights_GS.sum(1), 1)
    outside_G = (progress_G <= HELD_SPAN[0]) | (progress_G >= HELD_SPAN[1])
    assert weights_GS[outside_G][:, [0, -1]].max() == 0
    np.testing.assert_allclose(weights_GS.mean(0)[[0, -1]], 0.02, rtol=0.01)


def test_dealt_bins_keep_every_quota_and_forget_the_values():
    values, length_N = corpus_of(4000)
    layout = Layout(6, hold_extremes=0.05)
    real = cut_bins(values[:1], length_N, layout)
    dealt = deal_bins(real, layout, np.random.default_rng(0))
    assert sorted(dealt.id_N.tolist()) == list(range(4000))
    assert np.abs(dealt.tokens_S - real.tokens_S).max() <= length_N.max()
    assert dealt.length_N.tolist() == length_N[dealt.id_N].tolist()
    means = [values[0][dealt.bin_N == b].mean() for b in range(8)]
    assert np.ptp(means) < 5 * values[0].std() / np.sqrt(0.05 * 4000)


@pytest.mark.parametrize(
    ("layout", "num_measures", "sentence"),
    [
        (Layout(0), 1, "bins = 0: expected 1 to 1024"),
        (Layout(1023, hold_extremes=0.1), 1, "bins = 1023: expected 1 to 1024, extremes held apart included"),
        (Layout(64, 32), 2, "bins = 64 x 32: expected 1 to 1024"),
        (Layout(4, hold_extremes=0.5), 1, "--hold-extremes 0.5: expected a share"),
        (Layout(4, axis=3), 1, "--axis 3: expected 1 or 2"),
        (Layout(4, axis=2), 1, "1 measures, --second-bins 1, --axis 2: two measures are written"),
        (Layout(4, 3), 1, "need --second-bins above 1"),
        (Layout(4), 2, "2 measures, --second-bins 1"),
        (Layout(4, 2), 3, "more than two cannot"),
        (Layout(4, 2, hold_extremes=0.1), 2, "goes with one measure"),
    ],
)
def test_layouts_that_cannot_be_are_refused(layout, num_measures, sentence):
    with pytest.raises(InputError, match=sentence):
        layout.check(num_measures)
