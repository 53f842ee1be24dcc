"""Schedules are rows of weights that sum to one, follow the curves they are named after, and are parsed, never run.

Laws that hold for all of them (rows, orders used up exactly, mirrors, texts) are tried on random expressions of
families and combinators, nested up to three deep.
"""

import inspect
from dataclasses import replace
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from curriculum.bins import Layout
from curriculum.order import GRID, TOLERANCE, build_order, exact, project
from curriculum.schedules import FAMILIES, Schedule, custom, discrete, parse, reverse, spread_levels, window
from data.cli import InputError

BINS = [1, 2, 3, 16, 64]
TIMES = np.concatenate([np.linspace(0, 1, 401), np.nextafter([0.2, 0.5, 0.8, 1.0], 0)])
MOMENTS = (np.arange(GRID) + 0.5) / GRID  # where an order asks
NEEDED = {  # arguments of families that have no default for all of them
    "then": "{}, random",
    "reverse": "{}",
    "placebo": "{}",
    "discrete": "[(0.25, [1, 2]), (1, [3, 0, 1])]",
    "custom": "'curriculum.schedules:uniform'",
}


def expressions(sigma: float) -> list[str]:
    """One expression of every family, with that window width where it has one; a new family is covered by itself."""
    found = []
    for name, family in FAMILIES.items():
        arguments = [NEEDED[name].format(f"fold(3, sigma={sigma})")] if name in NEEDED else []
        if "sigma" in inspect.signature(family).parameters:
            arguments.append(f"sigma={sigma}")
        found.append(f"{name}({', '.join(arguments)})")
    return found


# Ranges from which every value is accepted; a family with a parameter that is not here fails the tests below.
RANGES = {
    "sigma": st.floats(0.02, 2) | st.just(0),
    "K": st.integers(1, 12),
    "A": st.floats(0, 0.5),
    "p": st.floats(0.05, 0.95),
    "q": st.floats(0.1, 10),
    "c0": st.floats(0.001, 1),
    "rho": st.floats(-1, 1),
    "s0": st.floats(0.01, 10),
    "s1": st.floats(0.01, 10),
    "beta0": st.floats(-100, 100),
    "beta1": st.floats(-100, 100),
    "eta": st.floats(0, 100),
    "share": st.floats(0, 1),
    "floor": st.floats(0.01, 1),
    "replay": st.floats(0.01, 1),
    "tau": st.floats(0.05, 0.95),
}


@st.composite
def random_stages(draw) -> str:
    until = sorted(draw(st.sets(st.integers(1, 19), max_size=3))) + [20]
    levels = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)
    return str([(end / 20, draw(levels)) for end in until])


@st.composite
def random_expressions(draw, depth: int = 2) -> str:
    """Any family with any arguments in range, any combinator on any of them."""
    inner = random_expressions(depth=depth - 1) if depth else st.sampled_from(["random", "fold(3)", "copula"])
    name = draw(st.sampled_from(sorted(FAMILIES.keys() - {"stock", "adaptive"})))  # parts of no other
    arguments = {}
    for parameter in inspect.signature(FAMILIES[name]).parameters.values():
        if parameter.annotation is Schedule:
            # A placebo inside then() is refused; that has a test of its own.
            arguments[parameter.name] = draw(inner.filter(lambda text: name != "then" or "placebo" not in text))
        elif get_origin(parameter.annotation) is Literal:
            arguments[parameter.name] = draw(st.sampled_from(get_args(parameter.annotation)))
        elif parameter.name == "stages":
            arguments[parameter.name] = draw(random_stages())
        elif name == "custom":
            arguments = {"target": "'curriculum.schedules:uniform'"}
        else:
            arguments[parameter.name] = repr(draw(RANGES[parameter.name]))
    return f"{name}({', '.join(f'{p}={value}' for p, value in arguments.items())})"


def mean_rank(schedule: Schedule, t_T: np.ndarray, num_bins: int) -> np.ndarray:
    return schedule.weights(t_T, num_bins) @ ((np.arange(num_bins) + 0.5) / num_bins)


def projected(text: str, num_bins: int) -> tuple[np.ndarray, float]:
    return exact(parse(text), Layout(num_bins))


# -- Rows


@pytest.mark.parametrize("sigma", [0, 1e-3, 0.08, 1, 10])
@pytest.mark.parametrize("num_bins", BINS)
def test_every_row_of_every_family_is_a_distribution(sigma, num_bins):
    for text in expressions(sigma):
        weights_TB = parse(text).weights(TIMES, num_bins)
        assert weights_TB.shape == (len(TIMES), num_bins), text
        assert np.all(weights_TB >= 0), text
        np.testing.assert_allclose(weights_TB.sum(1), 1, rtol=1e-12, err_msg=text)


@given(text=random_expressions(), num_bins=st.sampled_from([1, 2, 3, 7, 16, 1024]))
def test_every_row_of_any_schedule_is_a_distribution(text, num_bins):
    weights_TB = parse(text).weights(TIMES[::8], num_bins)
    assert weights_TB.shape == (len(TIMES[::8]), num_bins)
    assert np.all(weights_TB >= 0)
    np.testing.assert_allclose(weights_TB.sum(1), 1, rtol=1e-12)


def test_a_window_narrower_than_floats_can_say_is_still_a_distribution():
    np.testing.assert_allclose(parse("increasing(sigma=1e-200)").weights(TIMES, 4).sum(1), 1)


@given(mu=st.floats(0, 1), num_bins=st.integers(1, 20), sigma=st.floats(0.05, 10))
def test_a_window_is_a_gaussian_over_ranks(mu, num_bins, sigma):
    rank_B = [(b + 0.5) / num_bins for b in range(num_bins)]
    bell_B = np.exp([-((rank - mu) ** 2) / (2 * sigma**2) for rank in rank_B])
    np.testing.assert_allclose(window(np.array([mu]), num_bins, sigma)[0], bell_B / bell_B.sum(), rtol=1e-9)


@pytest.mark.parametrize("num_bins", [2, 5, 16])
def test_the_narrowest_window_follows_its_curve_exactly(num_bins):
    """At sigma = 0 the mean rank is the curve, as far as the middles of the first and last bin let it."""
    triangle = [0, 1, 0, 1]
    curves = {
        "increasing(sigma=0)": TIMES,
        "decreasing(sigma=0)": 1 - TIMES,
        "fold(4, sigma=0)": np.where(TIMES == 1, 1, np.modf(4 * TIMES)[0]),
        "zigzag(3, sigma=0)": np.interp(TIMES, np.linspace(0, 1, 4), triangle),
        "zigzag(1, sigma=0)": TIMES,
        "v(0.25, sigma=0)": np.interp(TIMES, [0, 0.25, 1], [1, 0, 1]),
        "inverted_v(0.25, sigma=0)": np.interp(TIMES, [0, 0.25, 1], [0, 1, 0]),
        "trend_cycle(0.1, 2, sigma=0)": TIMES + 0.1 * np.sin(4 * np.pi * TIMES),
        "random_then_anneal(0.5, down, sigma=0)": np.where(TIMES < 0.5, 0.5, 2 - 2 * TIMES),
    }
    for text, curve in curves.items():
        expected = np.clip(curve, 0.5 / num_bins, 1 - 0.5 / num_bins)
        np.testing.assert_allclose(mean_rank(parse(text), TIMES, num_bins), expected, atol=1e-9, err_msg=text)


def test_a_wider_window_is_a_weaker_schedule():
    """sigma is the coarse/fine knob: it bounds how far the run leans to one end, whatever B."""
    for num_bins in (4, 64):
        spans = [
            np.ptp(mean_rank(parse(f"increasing({sigma})"), TIMES, num_bins)) for sigma in (0, 0.08, 0.3, 1.0, 10.0)
        ]
        assert all(wide < narrow for narrow, wide in zip(spans[:-1], spans[1:], strict=True)), spans
        assert spans[-1] < 0.01


def test_families_are_mirrors_and_repeats_of_each_other():
    def weights(text, t):
        return parse(text).weights(t, 7)

    t = np.linspace(0, 1, 64, endpoint=False) + 1 / 256
    np.testing.assert_allclose(weights("decreasing", t), weights("increasing", 1 - t), atol=1e-12)
    np.testing.assert_allclose(weights("decreasing", t), weights("increasing", t)[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(weights("fold(4)", t), weights("increasing", (4 * t) % 1), atol=1e-12)
    np.testing.assert_allclose(weights("zigzag(2)", t), weights("zigzag(2)", 1 - t), atol=1e-12)
    np.testing.assert_allclose(weights("random", t), weights("stratified", t))
    np.testing.assert_allclose(weights("zigzag(2)", t), weights("inverted_v(0.5)", t), atol=1e-12)
    np.testing.assert_allclose(weights("v(0.3)", t), weights("inverted_v(0.3)", t)[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(weights("trend_cycle(0, 3)", t), weights("increasing", t), atol=1e-12)
    np.testing.assert_allclose(weights("outside_in", t), weights("mid_out", 1 - t), atol=1e-12)
    np.testing.assert_allclose(weights("tilt(-3, 5)", t), weights("tilt(3, -5)", t)[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(weights("copula(-0.6)", t), weights("copula(0.6)", t)[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(weights("copula(0)", t), weights("stratified", t), atol=1e-12)
    np.testing.assert_allclose(weights("copula(1)", t), weights("increasing(0)", t), atol=1e-12)
    middle_B = (np.arange(7) + 0.5) / 7
    np.testing.assert_allclose(weights("copula(0.99999)", middle_B), weights("copula(1)", middle_B), atol=1e-6)
    np.testing.assert_allclose(weights("hybrid(1)", t)[-9:], weights("incremental", t)[-9:], atol=1e-12)


def test_rho_is_one_dial_for_how_much_order_there_is():
    spans = [mean_rank(parse(f"copula({rho})"), np.array([0.02, 0.98]), 64) for rho in (-1, -0.5, 0, 0.5, 0.9, 1)]
    assert np.all(np.diff([late - early for early, late in spans]) > 0.01), spans


def gaussian_copula(rho: float, t: float, rank: float) -> float:
    x, y = (stats.norm.ppf(u) for u in (t, rank))
    joint = stats.multivariate_normal([0, 0], [[1, rho], [rho, 1]])
    return joint.pdf([x, y]) / (stats.norm.pdf(x) * stats.norm.pdf(y))


@given(rho=st.floats(-0.95, 0.95), t=st.floats(0.01, 0.99), num_bins=st.integers(1, 9))
@settings(max_examples=20)
def test_a_copula_is_the_density_that_scipy_knows(rho, t, num_bins):
    density_B = np.array([gaussian_copula(rho, t, (b + 0.5) / num_bins) for b in range(num_bins)])
    found_B = parse(f"copula({rho})").weights(np.array([t]), num_bins)[0]
    np.testing.assert_allclose(found_B, density_B / density_B.sum(), rtol=1e-6, atol=1e-12)


@given(q=st.floats(0.1, 10), c0=st.floats(0.001, 1), num_bins=st.integers(1, 40))
def test_pacing_covers_every_rank_up_to_its_competence_alike(q, c0, num_bins):
    t = np.linspace(0, 1, 33)
    competence_T = (c0**q + (1 - c0**q) * t) ** (1 / q)
    weights_TB = parse(f"pacing({q}, {c0})").weights(t, num_bins)
    for competence, weights_B in zip(competence_T, weights_TB, strict=True):
        below_B = np.minimum((np.arange(num_bins) + 1) / num_bins, competence)  # upper edges, cut off
        np.testing.assert_allclose(np.cumsum(weights_B), below_B / competence, rtol=1e-9)
    assert parse(f"pacing({q}, 1)").weights(t, num_bins) == pytest.approx(1 / num_bins)


# -- Levels


@given(
    weights=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    num_bins=st.integers(1, 30),
    times=st.integers(1, 4),
)
def test_levels_mean_the_same_at_any_number_of_bins(weights, num_bins, times):
    """Fine bins, merged, give the coarse ones; as many bins as levels give the weights themselves."""
    weights_SL = np.array([weights], float)
    coarse_SB, fine_SB = spread_levels(weights_SL, num_bins), spread_levels(weights_SL, num_bins * times)
    np.testing.assert_allclose(fine_SB.reshape(num_bins, times).sum(1), coarse_SB[0], atol=1e-12)
    np.testing.assert_allclose(spread_levels(weights_SL, len(weights)), weights_SL / weights_SL.sum(), atol=1e-12)


def test_levels_of_a_thousand_bins_leave_nothing_beyond_their_borders():
    rows_SB = spread_levels(np.eye(3), 1023)
    assert np.array_equal(rows_SB > 0, np.repeat(np.eye(3), 341, axis=1) > 0)


@pytest.mark.parametrize("num_bins", [3, 6, 16])
def test_three_levels_as_the_paper_has_them(num_bins):
    """Weights of the levels, and the stages' ends, from the iterations in the authors' code."""
    stages = {
        "sequential": ([40, 40, 40], np.eye(3)),
        "incremental": ([25, 30, 65], [[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]),
        "hybrid(0.5)": ([20, 30, 70], [[1, 0, 0], [1 / 3, 2 / 3, 0], [1 / 4, 1 / 4, 1 / 2]]),
    }
    for text, (iterations, level_SL) in stages.items():
        middle_T = (np.cumsum(iterations) - np.array(iterations) / 2) / 120
        end_T = np.cumsum(iterations)[:-1] / 120
        expected_SB = spread_levels(np.array(level_SL), num_bins)
        np.testing.assert_allclose(parse(text).weights(middle_T, num_bins), expected_SB, atol=1e-12)
        np.testing.assert_allclose(parse(text).weights(np.nextafter(end_T, 0), num_bins), expected_SB[:2], atol=1e-12)
        np.testing.assert_allclose(parse(text).weights(np.nextafter(end_T, 1), num_bins), expected_SB[1:], atol=1e-12)


# -- Exact orders


@pytest.mark.parametrize("text", [text for text in expressions(0.08) if "discrete" not in text])
def test_every_family_can_be_used_up_exactly(text):
    """At its defaults, whatever the number of bins: every moment full, every bin empty at the end."""
    for num_bins in BINS:
        wanted_GB, error = projected(text, num_bins)
        assert error <= TOLERANCE, num_bins
        np.testing.assert_allclose(wanted_GB.sum(0), 1 / num_bins, rtol=1e-9)
        np.testing.assert_allclose(wanted_GB.sum(1), 1 / GRID, rtol=max(1e-9, 2 * error))


@given(text=random_expressions(), num_bins=st.integers(1, 12))
@example("pacing(0.5, 0.01)", 8)
@example("discrete([(0.5, [1, 0]), (1, [1, 1, 0])])", 3)
@settings(max_examples=30)
def test_any_schedule_is_used_up_exactly_or_says_why_not(text, num_bins):
    weights_GB = parse(text).weights(MOMENTS, num_bins)
    try:
        wanted_GB, error = project(weights_GB, np.full(num_bins, 1 / num_bins))
    except InputError as refusal:
        said = str(refusal)
        assert said.startswith("the schedule never visits bin") == bool((weights_GB.sum(0) == 0).any()), said
        assert said.startswith(("the schedule never visits bin", "the schedule cannot use every segment exactly once"))
        return
    assert np.all(wanted_GB >= 0)
    np.testing.assert_allclose(wanted_GB.sum(0), 1 / num_bins, rtol=1e-9)
    np.testing.assert_allclose(wanted_GB.sum(1), 1 / GRID, rtol=max(1e-9, 2 * error))
    assert np.all(wanted_GB[weights_GB == 0] == 0)  # nothing is placed where it was not wanted


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pacing(0.5, 0.1)", "cannot use every segment exactly once"),
        ("discrete([(0.9, [1, 0]), (1, [0, 1])])", "cannot use every segment exactly once"),
        ("discrete([(0.5, [1, 0]), (1, [2, 0])])", "never visits bin 1"),
    ],
)
def test_what_cannot_be_used_up_says_why(text, sentence):
    with pytest.raises(InputError, match=sentence):
        projected(text, 2 if "discrete" in text else 16)


@pytest.mark.parametrize("num_bins", [3, 16])
@pytest.mark.parametrize("first", ["fold", "pacing", "tilt", "incremental", "random_then_anneal(0.3, down)"])
def test_a_random_tail_is_an_even_sample_whatever_came_before(first, num_bins):
    """Also where `first` asks too much of a bin: its own moments must make up for that."""
    wanted_GB, _ = projected(f"then({first}, random, tau=0.2)", num_bins)
    np.testing.assert_allclose(wanted_GB[MOMENTS > 0.8] * GRID, 1 / num_bins, rtol=1e-9)


@pytest.mark.parametrize(("text", "same"), [("tilt(-8, 0)", "tilt(-2, 6)"), ("tilt(3, 9)", "tilt(-3, 3)")])
def test_an_exact_tilt_knows_only_the_difference_of_its_slopes(text, same):
    np.testing.assert_allclose(projected(text, 16)[0], projected(same, 16)[0], atol=1e-9)


@pytest.mark.parametrize("replay", [0.05, 0.25, 1])
def test_replay_is_not_lost_in_projection(replay):
    """Scaling rows and columns keeps x21 x32 / (x22 x31) = replay; with equal levels that leaves one x21 (a root)."""
    exact_GL, _ = projected(f"hybrid({replay})", 3)
    stage_G = np.searchsorted([20 / 120, 50 / 120], MOMENTS, side="right")
    found_SL = np.array([exact_GL[stage_G == stage].sum(0) for stage in range(3)])
    easy_again = max(np.roots([1 - replay, 1 / 12 + replay * 5 / 12, -replay / 24]))
    assert found_SL[1, 0] == pytest.approx(easy_again, abs=1 / GRID)
    np.testing.assert_allclose(found_SL[0], [1 / 6, 0, 0], atol=1 / GRID)
    np.testing.assert_allclose(found_SL[2], [1 / 6 - easy_again, 1 / 12 + easy_again, 1 / 3], atol=1 / GRID)


# -- Combinators


def test_then_plays_one_schedule_after_the_other():
    t = np.linspace(0, 1, 101)
    both, first, second = parse("then(increasing, zigzag(2), tau=0.3)"), parse("increasing"), parse("zigzag(2)")
    early = t < 0.7 - 1e-9
    np.testing.assert_allclose(both.weights(t[early], 9), first.weights(t[early] / 0.7, 9))
    np.testing.assert_allclose(both.weights(t[~early], 9), second.weights((t[~early] - 0.7) / 0.3, 9), atol=1e-9)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("random", [(0, 1)]),
        ("stratified", []),
        ("fold(5)", []),
        ("warmup_then_random(0.15)", [(0.15, 1)]),
        ("then(fold(5), random, tau=0.25)", [(0.75, 1)]),
        ("then(random, fold(5), tau=0.25)", [(0, 0.75)]),
        ("then(then(fold, random, 0.5), random, 0.2)", [(0.4, 0.8), (0.8, 1)]),
        ("placebo(random)", [(0, 1)]),
        ("random_then_anneal(0.2)", [(0, 0.8)]),
        ("reverse(then(then(fold, random, 0.5), random, 0.2))", [(0, 0.2), (0.2, 0.6)]),
        ("reverse(stratified)", []),
    ],
)
def test_chance_rules_where_random_does(text, spans):
    assert np.ravel(parse(text).iid_spans).tolist() == pytest.approx(np.ravel(spans).tolist())


@given(text=random_expressions(), num_bins=st.integers(1, 12))
def test_reversed_twice_is_not_reversed(text, num_bins):
    once, twice, same = parse(f"reverse({text})"), parse(f"reverse(reverse({text}))"), parse(text)
    assert (twice.text, twice.iid_spans, twice.placebo) == (same.text, same.iid_spans, same.placebo)
    np.testing.assert_array_equal(twice.weights(TIMES[::8], num_bins), same.weights(TIMES[::8], num_bins))
    np.testing.assert_allclose(once.weights(TIMES[::8], num_bins), same.weights(1 - TIMES[::8], num_bins), atol=1e-9)
    mirrored = [(1 - b, 1 - a) for a, b in reversed(same.iid_spans)]
    assert np.ravel(once.iid_spans).tolist() == pytest.approx(np.ravel(mirrored).tolist())
    assert once.placebo == same.placebo


def test_in_python_reversed_twice_is_the_same_to_the_last_digits():
    schedule = parse("then(increasing, random, 0.25)")
    twice = reverse(reverse(schedule))
    np.testing.assert_allclose(twice.weights(TIMES, 7), schedule.weights(TIMES, 7), atol=1e-12)
    assert twice.iid_spans == schedule.iid_spans == ((0.75, 1),)


@given(text=random_expressions(), num_bins=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_a_placebo_keeps_every_quota(text, num_bins, seed):
    """Equal lengths make equal bins: at every moment as many segments of each bin as without it, ties (1) aside."""
    length_N, values_N = np.full(num_bins * 40, 5), np.random.default_rng(seed).normal(size=num_bins * 40)
    counts = []
    for placebo in (False, True):
        steady = replace(parse(text), placebo=placebo, iid_spans=())  # chance may place segments as it likes
        try:
            built = build_order(values_N, length_N, steady, num_bins, seed)
        except InputError as refusal:
            assert "the schedule" in str(refusal)
            return
        counts.append(np.cumsum(built.bin_M[:, None] == np.arange(num_bins), axis=0))
    assert np.abs(counts[0] - counts[1]).max() <= 1


def test_a_placebo_is_its_schedule_with_a_mark():
    for text in ("fold(5)", "then(fold(5), random, tau=0.2)"):
        real, sham = parse(text), parse(f"placebo({text})")
        np.testing.assert_array_equal(sham.weights(TIMES, 8), real.weights(TIMES, 8))
        assert (real.placebo, sham.placebo, sham.iid_spans) == (False, True, real.iid_spans)


@pytest.mark.parametrize("text", ["then(placebo(fold), random)", "then(fold, placebo(random))"])
def test_a_placebo_belongs_around_a_whole_run(text):
    with pytest.raises(InputError, match=r"write placebo\(then\(\.\.\.\)\), not then\(placebo\(\.\.\.\)\)"):
        parse(text)
    assert parse("placebo(then(fold, random))").placebo


# -- Parsing


@pytest.mark.parametrize("text", [*expressions(0.08), "then( fold(K = 5),random,\ttau=0.2 )", "random"])
def test_the_text_of_a_schedule_says_it_again(text):
    once = parse(text)
    twice = parse(once.text)
    assert twice.text == once.text and (twice.iid_spans, twice.placebo) == (once.iid_spans, once.placebo)
    np.testing.assert_array_equal(twice.weights(TIMES, 5), once.weights(TIMES, 5))


@given(text=random_expressions())
@settings(max_examples=100)
def test_a_canonical_text_is_a_fixed_point_of_parsing(text):
    once = parse(text)
    assert parse(once.text).text == once.text
    np.testing.assert_array_equal(parse(once.text).weights(TIMES[::8], 5), once.weights(TIMES[::8], 5))


@pytest.mark.parametrize(
    ("texts", "canonical"),
    [
        (("fold", "fold()", "fold(5)", "fold(K = 5)", "fold(sigma=8e-2)"), "fold(K=5, sigma=0.08)"),
        (("tilt(-4, 4)", "tilt(-4.0)", "tilt(beta1=4, beta0=-4)"), "tilt(beta0=-4.0, beta1=4.0)"),
        (("increasing(0)", "increasing(-0.0)", "reverse(reverse(increasing(0.0)))"), "increasing(sigma=0.0)"),
        (
            ("random_then_anneal", "random_then_anneal(0.2, up)", "random_then_anneal(direction='up')"),
            "random_then_anneal(tau=0.2, direction=up, sigma=0.08)",
        ),
        (
            ("discrete([(0.5, [1, 0]), (1, [1])])", "discrete(stages=((5e-1, (1, 0)), [1.0, [1]]))"),
            "discrete(stages=[(0.5, [1.0, 0.0]), (1.0, [1.0])])",
        ),
        (
            ("placebo(reverse(copula))", "reverse(placebo(copula))", "placebo(reverse(placebo(copula)))"),
            "placebo(schedule=reverse(schedule=copula(rho=0.5)))",
        ),
        (("random", "reverse(random)", "reverse(reverse(reverse(random)))"), "random"),
        (("placebo(sequential)", "reverse(reverse(placebo(sequential)))"), "placebo(schedule=sequential)"),
    ],
)
def test_what_can_be_said_in_several_ways_has_one_text(texts, canonical):
    assert {parse(text).text for text in texts} == {canonical}


KNOWN = f"known are {', '.join(FAMILIES)}$"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nosuch(3)", f"unknown name 'nosuch'; {KNOWN}"),
        ("then(fold, nosuch)", f"unknown name 'nosuch'; {KNOWN}"),
        ("fold(k=3)", r"fold: got an unexpected keyword argument 'k'; it is fold\(K=5, sigma=0.08\)"),
        ("fold(1, 2, 3)", r"fold: too many positional arguments; it is fold\(K=5, sigma=0.08\)"),
        ("then(fold)", r"then: missing a required argument: 'second'; it is then\(first, second, tau=0.2\)"),
        ("increasing(random)", r"increasing: sigma must be a number, not 'random'; it is increasing\(sigma=0.08\)"),
        ("placebo(3)", r"placebo: schedule must be a schedule, not '3'; it is placebo\(schedule\)"),
        ("placebo(nosuch(3))", f"unknown name 'nosuch'; {KNOWN}"),
        ("placebo(fold(random))", r"fold: K must be a number, not 'random'; it is fold\(K=5, sigma=0.08\)"),
        ("fold(True)", r"fold: K must be a number, not 'True'; it is fold\("),
        ("fold('5')", r"fold: K must be a number, not \"'5'\""),
        ("fold(2 + 3)", r"fold: K must be a number, not '2 \+ 3'"),
        ("fold(*[5])", r"fold: K must be a number, not '\*\[5\]'"),
        ("fold([5])", r"fold: K must be a number, not '\[5\]'"),
        (
            "random_then_anneal(0.2, sideways)",
            r"direction must be up or down, not 'sideways'; it is random_then_anneal",
        ),
        ("random_then_anneal(0.2, 1)", "direction must be up or down, not '1'"),
        (
            "discrete(5)",
            r"stages must be a list \[\(until, \[weight, ...\]\), ...\], not '5'; it is discrete\(stages\)",
        ),
        ("discrete([0.5, 1])", r"stages must be a list .*, not '\[0.5, 1\]'"),
        ("discrete([(1, [1], 2)])", r"stages must be a list .*, not '\[\(1, \[1\], 2\)\]'"),
        ("discrete([(1, [fold])])", r"stages must be a list .*, not '\[\(1, \[fold\]\)\]'"),
        ("custom(uniform)", "target must be a quoted text, not 'uniform'"),
        ("lambda: fold", "'lambda: fold' is not a schedule"),
        ("np.fold(3)", r"'np.fold\(3\)' is not a schedule"),
        ("'fold'", "is not a schedule; write e.g. fold"),
        ("-" * 300 + "7", "levels deep; expected at most 200"),
        ("fold(" * 2001 + ")", "characters long; expected at most 10000"),
        ("fold(K=5, **random)", "keywords must be strings"),
        ("7", "'7' is not a schedule; write e.g. fold"),
        ("-7.5", "'-7.5' is not a schedule; write e.g. fold"),
        ("fold(5", "is not an expression; write e.g. fold"),
        ("fold(5) random", "is not an expression"),
        ("x = fold(5)", "is not an expression"),
        ("", "is not an expression"),
    ],
)
def test_what_is_no_schedule_is_refused_with_what_would_be(text, sentence):
    with pytest.raises(InputError, match=sentence):
        parse(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fold(0)", "K = 0 is out of range: expected a whole number from 1 to 10000"),
        ("zigzag(10001)", "K = 10001 is out of range: expected a whole number from 1 to 10000"),
        ("fold(2.5)", "K = 2.5 is out of range: expected a whole number from 1 to 10000"),
        ("increasing(-0.1)", "sigma = -0.1 is out of range: expected from 0 to 10"),
        ("fold(5, sigma=10.5)", "sigma = 10.5 is out of range: expected from 0 to 10"),
        ("fold(5, sigma=1e999)", "sigma = inf is out of range: expected from 0 to 10"),
        ("then(fold, random, 0)", "tau = 0.0 is out of range: expected strictly between 0 and 1"),
        ("then(fold, random, tau=1)", "tau = 1.0 is out of range: expected strictly between 0 and 1"),
        ("copula(1.01)", "rho = 1.01 is out of range: expected from -1 to 1"),
        ("pacing(q=0)", "q = 0.0 is out of range: expected from 0.1 to 10"),
        ("pacing(c0=0)", "c0 = 0.0 is out of range: expected above 0, up to 1"),
        ("hybrid(0)", "replay = 0.0 is out of range: expected above 0, up to 1"),
        ("v(0)", "p = 0.0 is out of range: expected strictly between 0 and 1"),
        ("inverted_v(1)", "p = 1.0 is out of range: expected strictly between 0 and 1"),
        ("trend_cycle(A=0.6)", "A = 0.6 is out of range: expected from 0 to 0.5"),
        ("trend_cycle(K=0)", "K = 0 is out of range: expected a whole number from 1 to 10000"),
        ("mid_out(0)", "s0 = 0.0 is out of range: expected from 0.01 to 10"),
        ("outside_in(1, 11)", "s1 = 11.0 is out of range: expected from 0.01 to 10"),
        ("tilt(-101)", "beta0 = -101.0 is out of range: expected from -100 to 100"),
        ("tilt(0, 1" + "0" * 400 + ")", "beta1 = inf is out of range: expected from -100 to 100"),
        ("discrete([])", r"end at \[\]: expected rising numbers above 0, the last 1"),
        ("discrete([(0.5, [1])])", r"end at \[0.5\]: expected rising numbers above 0, the last 1"),
        ("discrete([(0, [1]), (1, [1])])", r"end at \[0.0, 1.0\]: expected rising numbers"),
        ("discrete([(0.5, [1]), (0.5, [2]), (1, [1])])", "expected rising numbers"),
        ("discrete([(1, [1]), (0.5, [2])])", "expected rising numbers"),
        ("discrete([(1, [])])", r"stage until 1.0 has weights \[\]: expected 1 to 1024 numbers"),
        ("discrete([(1, [0, 0])])", r"has weights \[0.0, 0.0\]: expected .* not all 0"),
        ("discrete([(1, [1, -1])])", r"has weights \[1.0, -1.0\]: expected 1 to 1024 numbers from 0"),
        ("discrete([(1, [1e999])])", r"has weights \[inf\]"),
        ("warmup_then_random(1.0)", "tau = 1.0 is out of range: expected strictly between 0 and 1"),
        ("warmup_then_random(-0.5)", "tau = -0.5 is out of range: expected strictly between 0 and 1"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(text, sentence):
    with pytest.raises(InputError, match=sentence):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir('ran')",
        "fold(__import__('os').mkdir('ran'))",
        "open('ran', 'w')",
        "fold(K=open('ran', 'w'))",
        "(lambda: open('ran', 'w'))()",
        "[open('ran', 'w') for _ in random]",
        "parse.__globals__['np'].save('ran', 1)",
        "fold(x := open('ran', 'w'))",
        "random if open('ran', 'w') else fold",
        "discrete([(1, [open('ran', 'w')])])",
        "random_then_anneal(0.2, open('ran', 'w'))",
        "custom('curriculum.schedules:' + open('ran', 'w').name)",
    ],
)
def test_nothing_is_executed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        parse(text)
    assert not any(tmp_path.iterdir())


# -- custom


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module to import; its name is new every time, since Python keeps what it has imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"mine_{len(list(tmp_path.iterdir()))}_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(f"import numpy as np\n{source}\n")
        return name

    return write


def test_a_function_of_yours_is_a_schedule_like_any_other(module):
    name = module("def rising(t, B): return np.outer(t, np.arange(B)) + 1")
    schedule = parse(f"then(custom('{name}:rising'), random, tau=0.5)")
    t = np.array([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(schedule.weights(t, 3) * 6, [[2, 2, 2], [4 / 3, 2, 8 / 3], [2, 2, 2], [2, 2, 2]])
    assert parse(schedule.text).text == schedule.text
    assert f"custom(target='{name}:rising', sha256='" in schedule.text


def test_an_edited_function_is_another_schedule(module, tmp_path):
    name = module("def flat(t, B): return np.ones((len(t), B))")
    before = parse(f"custom('{name}:flat')").text
    with open(tmp_path / f"{name}.py", "a") as file:
        file.write("# edited\n")
    assert parse(f"custom('{name}:flat')").text != before
    with pytest.raises(InputError, match="its source has changed, from [0-9a-f]{16} to [0-9a-f]{16}"):
        parse(before)


def test_what_a_function_may_change_is_its_own(module):
    """It gets a copy of the moments: scribbling on it moves nobody else."""
    name = module("def rude(t, B):\n    t[:] = 0\n    return np.ones((len(t), B))")
    t = np.array([0.0, 0.5, 1.0])
    parse(f"custom('{name}:rude')").weights(t, 2)
    assert t.tolist() == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("return np.ones((B, len(t)))", r"returned shape \(2, 3\), expected \(3, 2\): a row for each moment"),
        ("return np.ones(B)", r"returned shape \(2,\), expected \(3, 2\)"),
        ("return 1", r"returned shape \(\), expected"),
        ("return None", r"returned shape \(\), expected"),
        ("return 'even'", "called with 2 bins it raised ValueError"),
        ("return t[B + 1]", "called with 2 bins it raised IndexError"),
        ("return t.reshape(3, 2)", "called with 2 bins it raised ValueError"),
        ("return np.where(t[:, None] > 0.4, np.nan, 1) * np.ones(B)", "weights at progress 0.5 are NaN or infinite"),
        ("return np.full((len(t), B), np.inf)", "weights at progress 0 are NaN or infinite"),
        ("return np.stack([t, t - 1], 1)", "weights at progress 0 are negative; expected numbers of at least 0"),
        ("return np.stack([t, t], 1)", "weights at progress 0 are all zero; .* in each row one above 0"),
        ("return np.full((len(t), B), 1e308)", "weights at progress 0 are too large to add up"),
    ],
)
def test_what_a_function_returns_is_checked(source, sentence, module):
    name = module(f"def f(t, B): {source}")
    with pytest.raises(InputError, match=sentence):
        custom(f"{name}:f").weights(np.array([0.0, 0.5, 1.0]), 2)


def test_a_function_that_is_not_there_is_refused(module):
    name = module("def f(t): return 1\nnumber = 3")
    broken = module("raise RuntimeError('not today')")
    for target, sentence in {
        "f": 'expected "module:function"',
        ":f": 'expected "module:function"',
        f"{name}:": 'expected "module:function"',
        f"{name}:f:g": 'expected "module:function"',
        "../x:f": 'expected "module:function"',
        "no_such_module:f": "no module no_such_module with a file",
        "no_such.module:f": "no module no_such.module with a file",
        "sys:f": "no module sys with a file",
        f"{name}:g": f"{name} has no function g",
        f"{name}:number": f"{name} has no function number",
        f"{broken}:f": f"importing {broken} failed: RuntimeError\\('not today'\\)",
    }.items():
        with pytest.raises(InputError, match=sentence):
            parse(f"custom({target!r})")
    with pytest.raises(InputError, match="called with 2 bins it raised TypeError"):
        custom(f"{name}:f").weights(np.array([0.5]), 2)


def test_what_python_code_builds_is_what_text_says():
    stages = [(0.5, [1, 2]), (1, [2, 1])]
    np.testing.assert_array_equal(discrete(stages).weights(TIMES, 4), parse(f"discrete({stages})").weights(TIMES, 4))


@pytest.mark.parametrize("text", ["reverse(stock)", "placebo(stock)", "then(stock, random)", "then(random, stock)"])
def test_stock_is_a_part_of_no_other_schedule(text):
    with pytest.raises(InputError, match="stock leaves a (whole )?corpus as it lies"):
        parse(text)
