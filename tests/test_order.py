"""Orders are permutations that keep to their schedule, the same tokens for every arm, refused if they are not whole.

Lengths vary and values are tied on purpose: equal lengths and distinct values hide most mistakes.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from curriculum import score
from curriculum.bins import HELD_SPAN, Layout
from curriculum.diagnostics import CELLS, composition
from curriculum.order import (
    GRID,
    Built,
    build_order,
    check_segments,
    draw_subset,
    emit,
    exact,
    load_order,
    main,
    project,
    save_order,
    sorted_pool,
    val_path,
)
from curriculum.schedules import FAMILIES, Schedule, parse
from data.cli import InputError
from data.segments import corpus_segments
from data.shards import open_corpus

TEXTS = [
    "random",
    "stratified",
    "increasing",
    "decreasing(sigma=0)",
    "warmup_then_random(0.3)",
    "fold(5)",
    "zigzag(4, sigma=0.2)",
    "then(fold(3), random, tau=0.2)",
    "then(increasing(sigma=0), stratified, tau=0.5)",
    "placebo(increasing)",
    "v(0.3)",
    "inverted_v",
    "trend_cycle(0.2, 3)",
    "copula(0.7)",
    "then(pacing(2, 0.1), random, tau=0.3)",
    "mid_out",
    "outside_in",
    "tilt(-4, 4)",
    "discrete([(0.5, [1, 2]), (1, [1])])",
    "then(sequential, random, tau=0.3)",
    "then(incremental, random, tau=0.3)",
    "hybrid(0.5)",
    "random_then_anneal(0.3, down)",
    "reverse(warmup_then_random(0.3))",
    "custom('curriculum.schedules:uniform')",
    "adaptive(progress)",
]
KEEPING = TEXTS  # to their weights; the corpus as it lies does not
TEXTS = [*TEXTS, "stock"]


def corpus_of(num_segments: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Values of a measure, a fifth of them tied, and lengths from 1 to 64."""
    rng = np.random.default_rng(seed)
    values_N = rng.normal(size=num_segments)
    values_N[rng.random(num_segments) < 0.2] = 0.0
    return values_N, rng.integers(1, 65, num_segments).astype(np.int32)


def steady(schedule: Schedule) -> Schedule:
    """The schedule without chance: emission times as they are before stretches of it are drawn anew."""
    return replace(schedule, iid_spans=())


def demand(schedule: Schedule, built: Built) -> np.ndarray:
    """Tokens that the exact schedule has asked of each bin by progress g / GRID: (GRID + 1, B)."""
    wanted_GB, _ = exact(schedule, Layout(len(built.bins.tokens_S)))
    so_far_GB = np.cumsum(wanted_GB / wanted_GB.sum(0), axis=0)
    return np.vstack([np.zeros(so_far_GB.shape[1]), so_far_GB]) * built.bins.tokens_S


def test_every_family_is_tried_here():
    assert all(any(name in text for text in TEXTS) for name in FAMILIES)


# -- Exactly once


@given(
    lengths=st.lists(st.integers(4, 16), min_size=64, max_size=150),
    text=st.sampled_from(TEXTS),
    num_bins=st.integers(1, 8),
    levels=st.integers(1, 200),
    seed=st.integers(0, 2**32),
)
def test_every_order_is_a_permutation(lengths, text, num_bins, levels, seed):
    length_N = np.array(lengths, np.int32)
    values_N = np.random.default_rng(seed).integers(0, levels, len(lengths)).astype(float)
    built = build_order(values_N, length_N, parse(text), num_bins, seed)
    assert sorted(built.order_M.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize("text", TEXTS)
def test_an_order_is_a_function_of_its_arguments_and_every_seed_gives_another(text):
    values_N, length_N = corpus_of(500)
    first, again, other = (build_order(values_N, length_N, parse(text), 8, seed).order_M for seed in (3, 3, 4))
    assert first.tolist() == again.tolist()
    assert (first.tolist() == other.tolist()) == (text == "stock")


def test_one_corpus_gives_every_schedule_and_seed_the_same_multiset(tmp_path):
    values_N, length_N = corpus_of(300)
    hashes = []
    for number, text in enumerate(TEXTS):
        save(tmp_path / f"{number}.npy", build_order(values_N, length_N, parse(text), 8, number).order_M)
        hashes.append(load_order(tmp_path / f"{number}.npy").manifest)
    assert len({h["multiset_sha256"] for h in hashes}) == 1
    assert len({h["order_sha256"] for h in hashes}) == len(TEXTS)


# -- Bins


@given(st.integers(1, 16), st.integers(0, 5))
def test_bins_hold_equal_tokens_within_one_segment(num_bins, seed):
    values_N, length_N = corpus_of(400, seed)
    built = build_order(values_N, length_N, parse("stratified"), num_bins, seed)
    assert built.bins.tokens_S.tolist() == [length_N[built.bin_N == b].sum() for b in range(num_bins)]
    assert np.abs(built.bins.tokens_S - length_N.sum() / num_bins).max() <= length_N.max()


def test_bins_are_slices_of_the_sorted_segments_and_ties_go_by_id():
    values_N, length_N = corpus_of(400)
    built = build_order(values_N, length_N, parse("fold(5)"), 16, seed=1)
    by_value_then_id = sorted(range(400), key=lambda i: (values_N[i], i))
    assert np.all(np.diff(built.bin_N[by_value_then_id]) >= 0)


def test_the_edges_bin_other_segments_alike():
    """As validation segments are: by the values between bins, with no knowledge of the training lengths."""
    rng = np.random.default_rng(0)
    values_N, length_N = rng.normal(size=400), rng.integers(1, 65, 400)
    built = build_order(values_N, length_N, parse("random"), 16, seed=1)
    assert np.searchsorted(built.bins.edges_F, values_N, side="right").tolist() == built.bin_N.tolist()


def test_more_bins_than_segments_or_no_bins_are_refused():
    values_N, length_N = corpus_of(10)
    for num_bins in (0, -1, 1025):
        with pytest.raises(InputError, match=f"bins = {num_bins}: expected 1 to 1024"):
            build_order(values_N, length_N, parse("random"), num_bins, 0)
    with pytest.raises(InputError, match="bins = 11, but there are only 10 segments: use fewer bins"):
        build_order(values_N, length_N, parse("random"), 11, 0)
    giant_N = np.array([1, 1000, 1, 1])
    with pytest.raises(InputError, match="bin 1 would hold no segment .* use fewer bins"):
        build_order(np.arange(4.0), giant_N, parse("random"), 4, 0)


# -- The projection


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_the_projection_has_the_margins_asked_for_and_only_scales_rows_and_columns(num_cells, num_bins, seed):
    rng = np.random.default_rng(seed)
    weights_GB = rng.uniform(0.1, 1, (num_cells, num_bins))
    mass_B = rng.dirichlet(np.full(num_bins, 5.0)) + 0.05
    mass_B /= mass_B.sum()
    wanted_GB, error = project(weights_GB, mass_B)
    np.testing.assert_allclose(wanted_GB.sum(0), mass_B, rtol=1e-12)
    assert error < 1e-9
    np.testing.assert_allclose(wanted_GB.sum(1) * num_cells, 1, rtol=0, atol=error + 1e-12)
    # What Sinkhorn keeps is every ratio of ratios: rows and columns were multiplied, nothing else.
    factor_GB = np.log(wanted_GB / weights_GB)
    np.testing.assert_allclose(factor_GB - factor_GB[:1] - factor_GB[:, :1] + factor_GB[0, 0], 0, atol=1e-9)


def test_a_schedule_with_the_right_margins_is_not_touched():
    weights_GB = np.array([[0.75, 0.25], [0.25, 0.75]])
    np.testing.assert_allclose(project(weights_GB, np.array([0.5, 0.5]))[0], weights_GB / 2)


def test_the_columns_are_exact_also_where_the_rows_cannot_be():
    """A window as narrow as this uses up its sweeps: the rest of the error lies in the rows, where it is told."""
    progress_G = (np.arange(GRID) + 0.5) / GRID
    wanted_GB, error = project(parse("increasing(sigma=0.01)").weights(progress_G, 2), np.array([0.503, 0.497]))
    assert 1e-9 < error < 1e-3
    np.testing.assert_allclose(wanted_GB.sum(0), [0.503, 0.497], rtol=1e-12)
    np.testing.assert_allclose(np.abs(wanted_GB.sum(1) * GRID - 1).max(), error, rtol=1e-6)


def hand_made(*rows: list[float]) -> Schedule:
    """A schedule that holds each row for an equal stretch of progress."""
    rows_RB = np.array(rows)
    return Schedule(lambda t_T, num_bins: rows_RB[np.minimum((t_T * len(rows)).astype(int), len(rows) - 1)])


def test_a_schedule_that_never_visits_a_bin_is_refused():
    values_N, length_N = corpus_of(100)
    with pytest.raises(InputError, match="the schedule never visits bin 1: its segments could not be placed"):
        build_order(values_N, length_N, hand_made([1.0, 0.0, 0.0], [0.5, 0.0, 0.5]), 3, 0)


TOO_MUCH = (
    r"cannot use every segment exactly once: .* \(it wishes bin 1 for {}% of the tokens, there are 50.0%\); use a"
)


def test_a_schedule_that_asks_too_much_of_a_bin_is_refused():
    """13 of 25 stretches want the lower half of the tokens and nothing else, 12 the upper half."""
    values_N, length_N = corpus_of(1000)
    with pytest.raises(InputError, match=TOO_MUCH.format("48.0")):
        build_order(values_N, length_N, hand_made(*[[1, 0]] * 13, *[[0, 1]] * 12), 2, 0)


def test_a_schedule_that_asks_far_too_much_of_a_bin_is_refused_too():
    values_N, length_N = corpus_of(1000)
    with pytest.raises(InputError, match=TOO_MUCH.format("25.0")):
        build_order(values_N, length_N, hand_made([1, 0], [1, 0], [1, 0], [0, 1]), 2, 0)


# -- Keeping to the schedule


@pytest.mark.parametrize("num_bins", [1, 2, 24])
@pytest.mark.parametrize("text", KEEPING)
def test_no_bin_is_ever_off_its_schedule_by_more_than_half_a_segment(text, num_bins):
    """In the schedule's own time: at every tau, what a bin has emitted is what was asked of it."""
    values_N, length_N = corpus_of(1500)
    schedule = parse(text)
    built = build_order(values_N, length_N, schedule, num_bins, seed=2)
    asked_GB = demand(schedule, built)
    np.testing.assert_allclose(np.cumsum(built.asked_GS, axis=0), asked_GB[1:], rtol=1e-9)
    entries = emit(built.bins, built.asked_GS, seed=2)
    for b in range(num_bins):
        of_bin = np.flatnonzero(entries.bin_M == b)
        in_time = of_bin[np.argsort(entries.tau_M[of_bin])]
        emitted = np.concatenate([[0], np.cumsum(entries.length_M[in_time])])
        due = np.interp(entries.tau_M[in_time], np.linspace(0, 1, GRID + 1), asked_GB[:, b])
        half = length_N.max() / 2 + 1e-4  # the ties' jitter is 2^-32 of 50,000 tokens
        assert np.abs(emitted[:-1] - due).max() <= half and np.abs(emitted[1:] - due).max() <= half


@pytest.mark.parametrize("num_bins", [1, 2, 24])
@pytest.mark.parametrize("text", KEEPING)
def test_the_stream_keeps_to_the_schedule(text, num_bins):
    """At every point of the token stream. There the clock is the sum of all bins, each off by half a segment at most,
    so a bin may be off by half a segment for each of them and its own."""
    values_N, length_N = corpus_of(1500)
    schedule = steady(parse(text))
    built = build_order(values_N, length_N, schedule, num_bins, seed=2)
    asked_GB = demand(schedule, built)
    length, bins = length_N[built.order_M], built.bin_N[built.order_M]
    progress = np.cumsum(length) / length.sum()
    allowed = (num_bins + 1) / 2 * length_N.max() + built.schedule_error * length.sum()
    for b in range(num_bins):
        due = np.interp(progress, np.linspace(0, 1, GRID + 1), asked_GB[:, b])
        assert np.abs(np.cumsum(length * (bins == b)) - due).max() <= allowed


def test_the_composition_counts_the_order_it_describes():
    values_N, length_N = corpus_of(700)
    built = build_order(values_N, length_N, parse("fold(3)"), 4, seed=0)
    rank_N = np.random.default_rng(0).random(700)
    length_M = length_N[built.order_M]
    given_CB, rank_C, length_C = composition(
        np.cumsum(length_M), length_M, built.bin_N[built.order_M], rank_N[built.order_M], 4
    )
    tokens_CB, mass_C, count_C, at = np.zeros((CELLS, 4)), np.zeros(CELLS), np.zeros(CELLS), 0
    for i in built.order_M:
        cell = int((at + length_N[i] / 2) / length_N.sum() * CELLS)
        tokens_CB[cell, built.bin_N[i]] += length_N[i]
        mass_C[cell] += length_N[i] * rank_N[i]
        count_C[cell] += 1
        at += length_N[i]
    assert given_CB.tolist() == tokens_CB.tolist()
    np.testing.assert_allclose(length_C, tokens_CB.sum(1) / count_C)
    np.testing.assert_allclose(rank_C, mass_C / tokens_CB.sum(1))


def test_increasing_rises_and_decreasing_falls():
    values_N, length_N = corpus_of(2000)
    for text, sign in (("increasing", 1), ("decreasing", -1)):
        order_N = build_order(values_N, length_N, parse(text), 16, 0).order_M
        assert sign * stats.spearmanr(np.arange(2000), values_N[order_N]).statistic > 0.9


@pytest.mark.parametrize("epochs", [1, 3])
def test_stock_is_the_corpus_as_it_lies(epochs):
    values_N, length_N = corpus_of(700)
    built = build_order(values_N, length_N, parse("stock"), 8, 0, epochs=epochs)
    assert built.order_M.tolist() == list(range(700)) * epochs
    with pytest.raises(InputError, match="stock is the corpus as it lies"):
        build_order(values_N, length_N, parse("stock"), 8, 0, budget_tokens=1000)


# -- Chance and its absence


def block_counts(text: str, seed: int, num_bins: int = 4, num_blocks: int = 20) -> np.ndarray:
    """How many of 2,000 equally long segments of each bin lie in each block of the order: (blocks, bins)."""
    values_N = np.random.default_rng(99).permutation(2000).astype(float)
    built = build_order(values_N, np.full(2000, 8), parse(text), num_bins, seed)
    blocks = np.split(built.bin_N[built.order_M], num_blocks)
    return np.array([np.bincount(block, minlength=num_bins) for block in blocks])


def dispersion(counts: np.ndarray) -> float:
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def test_random_fluctuates_as_an_honest_shuffle_does():
    """The counts' chi-square over 30 seeds: neither too clustered nor too even, as a spread-out order would be."""
    freedom = 30 * (20 - 1) * (4 - 1)
    total = sum(dispersion(block_counts("random", seed)) for seed in range(30))
    assert 1e-4 < stats.chi2.cdf(total, freedom) < 1 - 1e-4
    too_even = sum(dispersion(block_counts("stratified", seed)) for seed in range(30))
    assert stats.chi2.cdf(too_even, freedom) < 1e-12


def test_random_places_every_segment_anywhere():
    values_N, length_N = corpus_of(40)
    place = [np.argsort(build_order(values_N, length_N, parse("random"), 4, seed).order_M) for seed in range(300)]
    for of_segment in np.array(place).T[::8]:
        assert stats.kstest((of_segment + 0.5) / 40, "uniform").pvalue > 1e-4


def test_random_knows_nothing_of_the_measure_or_its_bins():
    values_N, length_N = corpus_of(500)
    orders = [
        build_order(values, length_N, parse("random"), num_bins, seed=5).order_M.tolist()
        for values, num_bins in ((values_N, 16), (-values_N, 16), (values_N**2, 3))
    ]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("num_bins", [2, 5, 20])
def test_stratified_gives_every_batch_its_exact_share_of_every_bin(num_bins):
    counts = block_counts("stratified", seed=3, num_bins=num_bins, num_blocks=2000 // num_bins)
    assert np.all(counts == 1)


def test_a_random_tail_is_random_only_there():
    """Before the tail the order is that of the steady schedule; behind it, the same segments in another order."""
    values_N, length_N = corpus_of(1000)
    schedule = parse("then(stratified, random, tau=0.4)")
    tailed = build_order(values_N, length_N, schedule, 8, 0).order_M
    calm = build_order(values_N, length_N, steady(schedule), 8, 0).order_M
    same = int(np.argmin(tailed == calm))
    assert length_N[calm[:same]].sum() == pytest.approx(0.6 * length_N.sum(), abs=8 * 64)
    assert sorted(tailed[same:].tolist()) == sorted(calm[same:].tolist())
    assert np.mean(tailed[same:] == calm[same:]) < 0.05


# -- Epochs and reweighting


@pytest.mark.parametrize("text", ["random", "increasing", "then(fold(3), random, tau=0.3)", "placebo(zigzag(2))"])
def test_epochs_use_every_segment_equally_often_and_never_in_the_same_shuffle(text):
    values_N, length_N = corpus_of(600)
    built = build_order(values_N, length_N, parse(text), 4, 0, epochs=3)
    assert np.bincount(built.order_M, minlength=600).tolist() == [3] * 600
    stream = emit(built.bins, built.asked_GS, seed=0, whole_passes=3)
    for b in range(4):
        passes = stream.id_M[stream.bin_M == b].reshape(3, -1)
        assert all(set(p) == set(passes[0]) for p in passes) and len({tuple(p) for p in passes}) == 3
    once = build_order(values_N, length_N, parse(text), 4, 0)
    assert (once.order_M.tolist() == built.order_M.tolist()) is False and len(once.order_M) == 600


def test_an_epoch_of_a_bin_is_over_before_the_next_begins():
    """Equal spacing of repeats: what was seen is seen again only after all of its bin."""
    values_N, length_N = corpus_of(400)
    order_M = build_order(values_N, length_N, parse("stratified"), 1, 0, epochs=2).order_M
    assert sorted(order_M[:400].tolist()) == sorted(order_M[400:].tolist()) == list(range(400))


@given(st.sampled_from(TEXTS), st.integers(200, 60_000), st.integers(0, 100))
def test_reweighting_gives_every_bin_what_the_schedule_asks(text, budget, seed):
    """Within a segment: no projection, so bins repeat or are left out."""
    values_N, length_N = corpus_of(500)
    schedule = steady(parse(text))
    built = build_order(values_N, length_N, schedule, 4, seed, budget_tokens=budget)
    asked_B = schedule.weights((np.arange(GRID) + 0.5) / GRID, 4).mean(0) * budget
    given_B = np.bincount(built.bin_M, weights=built.length_M, minlength=4)
    assert built.length_M.sum() <= budget
    # Half a segment for each bin's own end, and what lies beyond the budget is cut off at the end of the run.
    assert np.abs(given_B - asked_B).max() <= 3 * length_N.max()
    counts_N = np.bincount(built.order_M, minlength=500)
    for b in range(4):  # within a bin nothing is used n + 2 times before all are used n + 1 times, cut-off tail apart
        of_bin = np.sort(counts_N[built.bin_N == b])
        assert of_bin[-1] - of_bin[min(4, len(of_bin) - 1)] <= 2
    assert np.array_equal(built.length_M, length_N[built.order_M])


def test_a_reweighted_schedule_may_leave_bins_out_but_not_repeat_one_for_ever():
    values_N, length_N = corpus_of(500)
    hardest = hand_made([0.0, 0.0, 0.0, 1.0])
    built = build_order(values_N, length_N, hardest, 4, 0, budget_tokens=20_000)
    assert set(built.bin_M.tolist()) == {3} and np.bincount(built.order_M).max() > 1
    with pytest.raises(InputError, match="the schedule asks bin 3 for 99000000 tokens, it holds .* at most 1000"):
        build_order(values_N, length_N, hardest, 4, 0, budget_tokens=99_000_000)


# -- Batches


@pytest.mark.parametrize("text", KEEPING)
def test_every_batch_has_its_share_of_every_bin_within_a_segment(text):
    """Between two moments a bin emits what its schedule asks of it then, give or take one segment."""
    values_N, length_N = corpus_of(3000)
    schedule, num_bins = steady(parse(text)), 8
    built = build_order(values_N, length_N, schedule, num_bins, seed=2)
    entries = emit(built.bins, built.asked_GS, seed=2)
    sequence = np.argsort(entries.tau_M, kind="stable")
    assert entries.id_M[sequence].tolist() == built.order_M.tolist()
    asked_GB = np.vstack([np.zeros(num_bins), np.cumsum(built.asked_GS, axis=0)])
    cuts = np.linspace(0, 3000, 40).astype(int)  # batches of about 75 segments
    moments = np.concatenate(
        [[0], (entries.tau_M[sequence][cuts[1:-1] - 1] + entries.tau_M[sequence][cuts[1:-1]]) / 2, [1]]
    )
    tokens = entries.length_M[sequence, None] * (entries.bin_M[sequence, None] == np.arange(num_bins))
    given_TB = np.add.reduceat(tokens, cuts[:-1], axis=0)
    due = np.stack([np.interp(moments, np.linspace(0, 1, GRID + 1), asked_GB[:, b]) for b in range(num_bins)], axis=1)
    assert np.abs(given_TB - np.diff(due, axis=0)).max() <= length_N.max() + 1e-3


# -- Placebo


def test_a_placebo_plays_its_schedule_over_bins_without_meaning():
    values_N, length_N = corpus_of(4000)
    real = build_order(values_N, length_N, parse("increasing"), 16, 0)
    shams = [build_order(values_N, length_N, parse("placebo(increasing)"), 16, seed) for seed in range(5)]
    five_sd = 5 / np.sqrt(4000)
    assert stats.spearmanr(real.bin_N, values_N).statistic > 0.9
    for sham in shams:
        assert abs(stats.spearmanr(sham.bin_N, values_N).statistic) < five_sd
        assert abs(stats.spearmanr(np.argsort(sham.order_M), values_N).statistic) < five_sd
        assert (
            stats.spearmanr(np.arange(4000), sham.bin_N[sham.order_M]).statistic > 0.9
        )  # the schedule is still played
    assert len({tuple(sham.bin_N.tolist()) for sham in shams}) == len(shams)


def test_a_placebo_keeps_the_tokens_of_every_bin_whatever_the_measure():
    length_N = np.random.default_rng(0).integers(8, 1025, 4000)
    built = build_order(length_N.astype(float), length_N, parse("placebo(increasing)"), 16, 0)
    assert np.ptp(built.bins.tokens_S) <= 2 * length_N.max()


def test_a_placebo_that_leaves_a_bin_empty_is_refused():
    length_N = np.array([55, 12, 6, 56, 2, 35, 6, 20, 31, 28, 26, 2])
    with pytest.raises(InputError, match="would hold no segment"):
        build_order(length_N.astype(float), length_N, parse("placebo(random)"), 6, seed=14)


# -- A budget


@given(st.integers(64, 30_000), st.integers(0, 3))
def test_a_budget_is_filled_to_within_a_segment(budget, seed):
    _, length_N = corpus_of(1000)
    assume(budget <= length_N.sum())
    chosen = draw_subset(length_N, budget, seed)
    assert np.all(np.diff(chosen) > 0)
    assert budget - length_N.max() < length_N[chosen].sum() <= budget
    assert chosen.tolist() == draw_subset(length_N, budget, seed).tolist()
    if budget < length_N.sum() / 2:
        assert chosen.tolist() != draw_subset(length_N, budget, seed + 1).tolist()


def test_a_subset_takes_from_everywhere_alike():
    length_N = np.full(2000, 8)
    places = np.concatenate([draw_subset(length_N, 1600, seed) for seed in range(10)])
    assert stats.kstest((places + 0.5) / 2000, "uniform").pvalue > 1e-4


def test_a_budget_that_cannot_be_met_is_refused():
    length_N = np.array([10, 20, 30])
    assert draw_subset(length_N, 0, 0).tolist() == draw_subset(length_N, 60, 0).tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="--tokens 61: the scored corpus holds only 60 tokens"):
        draw_subset(length_N, 61, 0)
    with pytest.raises(InputError, match="--tokens 9: less than one segment"):
        draw_subset(length_N, 9, 0)


# -- Order files


def save(path, ids) -> None:
    manifest = dict(measure="m", schedule="random", bins=1, multiset="exact", budget_tokens=0, subset_seed=0)
    save_order(path, np.asarray(ids), manifest | dict(scores=dict(id="x")))


@pytest.mark.parametrize(("largest", "dtype"), [(2**31 - 1, np.int32), (2**31, np.int64)])
def test_an_order_reads_back_as_written_in_the_smallest_type(tmp_path, largest, dtype):
    save(tmp_path / "a.npy", [5, largest, 0])
    order = load_order(tmp_path / "a.npy")
    assert order.ids_N.tolist() == [5, largest, 0] and order.ids_N.dtype == dtype
    assert order.manifest["measure"] == "m"


def damage(tmp_path, how: str):
    path = tmp_path / "a.npy"
    save(path, np.arange(100))
    manifest = json.loads(path.with_suffix(".json").read_text())
    match how:
        case "no order":
            path.unlink()
        case "no manifest":
            path.with_suffix(".json").unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-4])
        case "empty":
            path.write_bytes(b"")
        case "swapped ids":
            np.save(path, np.array([1, 0, *range(2, 100)], np.int32))
        case "other order":
            np.save(path, np.arange(99, dtype=np.int32))
        case "other version":
            path.with_suffix(".json").write_text(json.dumps(manifest | {"version": 99}))
        case "half a manifest":
            path.with_suffix(".json").write_text(json.dumps(manifest)[:50])
    return path


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no order", "no such order; make one with curriculum.order"),
        ("no manifest", r"its manifest a\.json is missing"),
        ("truncated", "not a whole .npy file"),
        ("empty", "not a whole .npy file"),
        ("swapped ids", r"its content hashes to \w{12}, its manifest says \w{12}"),
        ("other order", r"its content hashes to \w{12}, its manifest says \w{12}"),
        ("other version", "order format version 99, expected 2"),
        ("half a manifest", "something unreadable"),
    ],
)
def test_an_order_that_is_not_whole_is_refused(tmp_path, how, sentence):
    with pytest.raises(InputError, match=sentence):
        load_order(damage(tmp_path, how))


# -- The command, on the tiny corpus scored without a model


@pytest.fixture(scope="module")
def scores(tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    score.main(str(tiny_corpus), "none", folder, max_len=64)
    return folder


def make(scores, out, **options):
    main(scores, out, **{"measure": "unigram_nll", "bins": 4} | options)
    return load_order(out)


def test_arms_differ_by_recipe_runs_of_an_arm_by_order_and_all_have_the_same_tokens(scores, tmp_path, tiny_corpus):
    random0, random1, rising = (
        make(scores, tmp_path / f"{name}.npy", schedule=schedule, seed=seed)
        for name, schedule, seed in (("r0", "random", 0), ("r1", "random", 1), ("up", "increasing", 0))
    )
    segments = corpus_segments(open_corpus(tiny_corpus), 64)
    assert sorted(rising.ids_N.tolist()) == list(range(len(segments)))
    assert rising.manifest["num_tokens"] == segments.num_tokens
    keys = ("multiset_sha256", "order_sha256", "recipe")
    assert [random0.manifest[k] == random1.manifest[k] for k in keys] == [True, False, True]
    assert [random0.manifest[k] == rising.manifest[k] for k in keys] == [True, False, False]


def test_a_budget_gives_every_schedule_the_same_subset(scores, tmp_path, tiny_corpus):
    def subset(name, **options):
        return sorted(make(scores, tmp_path / f"{name}.npy", tokens=2000, **options).ids_N.tolist())

    same = draw_subset(corpus_segments(open_corpus(tiny_corpus), 64).length_N, 2000, 0).tolist()
    assert same == subset("a", schedule="random", seed=1)
    assert same == subset("b", schedule="fold(2)", seed=2, measure="length") == subset("c", schedule="placebo(fold(2))")
    assert same != subset("d", subset_seed=1)
    with pytest.raises(InputError, match="--tokens 99999: the scored corpus holds only"):
        make(scores, tmp_path / "e.npy", tokens=99_999)


@pytest.mark.parametrize("measure", ["unigram_nll", "length"])  # of which the second has ties at every edge
def test_validation_segments_are_binned_by_the_edges_of_the_training_segments(scores, tmp_path, measure):
    order = make(scores, tmp_path / "a.npy", schedule="increasing", measure=measure)
    val = score.read_scores(scores, "val")
    bin_V = np.load(val_path(tmp_path / "a.npy"))
    edges = order.manifest["edges"]
    assert bin_V.tolist() == [sum(value >= edge for edge in edges) for value in val.columns[measure]]
    assert len(set(bin_V.tolist())) > 1 and order.manifest["val_segments_sha256"] == val.segments.digest()


def test_an_order_fits_only_the_segments_it_was_made_for(scores, tmp_path, tiny_corpus):
    order = make(scores, tmp_path / "a.npy")
    corpus = open_corpus(tiny_corpus)
    check_segments(order, corpus_segments(corpus, 64), "a.npy")
    for other in (corpus_segments(corpus, 32), corpus_segments(corpus, 64, "window")):
        with pytest.raises(InputError, match=r"a\.npy: an order of other shards: .* max_len 64"):
            check_segments(order, other, "a.npy")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(measure="log(length - length)"), r"is NaN or infinite for \d+ of \d+ segments"),
        (dict(measure="nll"), "no column 'nll'; there are length, zstd_ratio, unigram_nll, type_token_ratio"),
        (dict(schedule="nosuch"), "unknown name 'nosuch'"),
        (dict(bins=1000), r"bins = 1000, but there are only \d+ segments"),
        (dict(seed=-1), "--seed -1, .*: expected 0 or more"),
        (dict(tokens=-1), "--tokens -1: expected 0 or more"),
        (dict(epochs=0), "--epochs 0: expected 1 to 1000"),
        (
            dict(tokens=99_999, epochs=2),
            "holds only 59[0-9]{2} tokens, 2 epochs of it 119[0-9]{2}: ask for fewer or raise",
        ),
        (dict(multiset="reweight", epochs=2), "--multiset reweight draws from the whole corpus"),
        (dict(measure="length x unigram_nll"), "2 measures, --second-bins 1"),
        (dict(second_bins=2), "1 measures, --second-bins 2"),
        (dict(hold_extremes=0.7), "--hold-extremes 0.7"),
    ],
)
def test_what_cannot_be_ordered_is_refused_and_nothing_is_written(scores, tmp_path, options, sentence):
    with pytest.raises(InputError, match=sentence):
        make(scores, tmp_path / "a.npy", **options)
    assert not any(tmp_path.iterdir())


def test_the_manifest_tells_what_the_order_does(scores, tmp_path, tiny_corpus):
    length_N = corpus_segments(open_corpus(tiny_corpus), 64).length_N
    rising, twice, chosen = (
        make(scores, tmp_path / f"{name}.npy", **options)
        for name, options in (
            ("up", dict(schedule="increasing")),
            ("twice", dict(schedule="decreasing", epochs=2)),
            ("chosen", dict(schedule="tilt(3, 3)", multiset="reweight", tokens=int(length_N.sum()))),
        )
    )
    about = rising.manifest
    assert about["coverage"] == 1 and about["omitted_segments"] == about["repeated_segments"] == 0
    assert about["given_tokens"] == about["bin_tokens"] and sum(about["given_tokens"]) == about["num_tokens"]
    np.testing.assert_allclose(about["asked_tokens"], about["given_tokens"], atol=0.1)
    assert about["last_rank"] > 0.7 > 0.5 > about["lr_weighted_rank"]  # the learning rate is low where ranks are high
    assert about["largest_deviation_tokens"] <= 64 * 5
    about = twice.manifest
    assert about["num_tokens"] == 2 * length_N.sum() and about["most_repeats"] == 2 and about["last_rank"] < 0.3
    assert np.bincount(twice.ids_N).tolist() == [2] * len(length_N)
    about = chosen.manifest
    assert about["multiset"] == "reweight" and about["coverage"] < 1 and about["omitted_segments"] > 0
    used = np.bincount(chosen.ids_N, minlength=len(length_N))
    assert about["repeated_segments"] == np.count_nonzero(used > 1) and about["most_repeats"] == used.max()
    assert about["coverage"] == pytest.approx(length_N[used > 0].sum() / length_N.sum())
    assert len({order.manifest["multiset_sha256"] for order in (rising, twice, chosen)}) == 3
    assert len({order.manifest["recipe"] for order in (rising, twice, chosen)}) == 3


@pytest.mark.parametrize("text", ["random", "increasing", "then(fold(2), random, tau=0.4)"])
def test_held_extremes_are_not_seen_first_or_last(text):
    """Also where the schedule is chance."""
    values_N, length_N = corpus_of(5000)
    built = build_order(np.arange(5000.0), length_N, parse(text), Layout(8, hold_extremes=0.03), 0)
    assert sorted(built.order_M.tolist()) == list(range(5000))
    progress = np.cumsum(built.length_M) / built.length_M.sum()
    of_extremes = progress[(built.bin_M == 0) | (built.bin_M == 9)]
    # Chance fills the ends of a run a little less or more than its moments, so the span is met to 2 % of the run.
    assert HELD_SPAN[0] - 0.02 < of_extremes.min() and of_extremes.max() < HELD_SPAN[1] + 0.02
    assert len(of_extremes) > 200 and stats.kstest(of_extremes, "uniform", (0.1, 0.8)).pvalue > 1e-3


def test_two_measures_make_a_grid_of_bins(scores, tmp_path):
    grid = make(
        scores, tmp_path / "a.npy", measure="length x unigram_nll", bins=3, second_bins=2, schedule="increasing", axis=2
    )
    assert grid.manifest["bins"] == 6 and np.array(grid.manifest["composition"]).shape[1] == 6
    val = np.load(val_path(tmp_path / "a.npy"))
    assert set(val.tolist()) <= set(range(6))
    first = make(
        scores, tmp_path / "b.npy", measure="length x unigram_nll", bins=3, second_bins=2, schedule="increasing"
    )
    assert first.manifest["recipe"] != grid.manifest["recipe"]


@pytest.mark.parametrize(
    "options",
    [
        dict(schedule="placebo(fold(2))", tokens=3000),
        dict(hold_extremes=0.1),
        dict(measure="length x unigram_nll", bins=3, second_bins=2),
        dict(multiset="reweight", schedule="tilt(4, 4)"),
    ],
)
def test_the_pool_behind_an_order_is_binned_again_as_it_was(scores, tmp_path, options):
    order = make(scores, tmp_path / "a.npy", **options)
    table = score.read_scores(scores)
    pool = sorted_pool(order, table)
    at_N = np.searchsorted(pool.ids_P, order.ids_N)
    given = np.bincount(
        pool.bin_P[at_N], weights=table.segments.length_N[order.ids_N], minlength=order.manifest["bins"]
    )
    assert given.tolist() == order.manifest["given_tokens"]
    order.manifest["bin_tokens"][0] += 1
    with pytest.raises(InputError, match="bins of other sizes"):
        sorted_pool(order, table)


def test_an_existing_order_is_refused_and_left_alone(scores, tmp_path):
    out = tmp_path / "a.npy"
    out.write_bytes(b"precious")
    with pytest.raises(InputError, match="already there; remove it or choose another --out"):
        main(scores, out)
    assert out.read_bytes() == b"precious"
    with pytest.raises(InputError, match=r"an order file ends in \.npy"):
        main(scores, tmp_path / "a.json")
