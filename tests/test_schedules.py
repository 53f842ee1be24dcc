"""Schedules are rows of weights that sum to one, follow the curves they are named after, and are parsed, never run."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.schedules import FAMILIES, Schedule, parse, window
from data.cli import InputError

BINS = [1, 2, 3, 16, 64]
TIMES = np.concatenate([np.linspace(0, 1, 401), np.nextafter([0.2, 0.5, 0.8, 1.0], 0)])


def expressions(sigma: float) -> list[str]:
    """One expression of every family, with that window width where it has one; a new family is covered by itself."""
    found = []
    for name, family in FAMILIES.items():
        arguments = []
        for parameter in inspect.signature(family).parameters.values():
            if parameter.annotation is Schedule:
                arguments.append(f"fold(3, sigma={sigma})" if not arguments else "random")
            elif parameter.name == "sigma":
                arguments.append(f"sigma={sigma}")
        found.append(f"{name}({', '.join(arguments)})")
    return found


def mean_rank(schedule: Schedule, t_T: np.ndarray, num_bins: int) -> np.ndarray:
    return schedule.weights(t_T, num_bins) @ ((np.arange(num_bins) + 0.5) / num_bins)


# -- Rows


@pytest.mark.parametrize("sigma", [0, 1e-3, 0.08, 1, 10])
@pytest.mark.parametrize("num_bins", BINS)
def test_every_row_of_every_family_is_a_distribution(sigma, num_bins):
    for text in expressions(sigma):
        weights_TB = parse(text).weights(TIMES, num_bins)
        assert weights_TB.shape == (len(TIMES), num_bins), text
        assert np.all(weights_TB >= 0), text
        np.testing.assert_allclose(weights_TB.sum(1), 1, rtol=1e-12, err_msg=text)


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
    ],
)
def test_chance_rules_where_random_does(text, spans):
    assert np.ravel(parse(text).iid_spans).tolist() == pytest.approx(np.ravel(spans).tolist())


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


KNOWN = f"known are {', '.join(FAMILIES)}$"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nosuch(3)", f"unknown name 'nosuch'; {KNOWN}"),
        ("then(fold, nosuch)", f"unknown name 'nosuch'; {KNOWN}"),
        ("fold(k=3)", r"fold: got an unexpected keyword argument 'k'; it is fold\(K=5, sigma=0.08\)"),
        ("fold(1, 2, 3)", r"fold: too many positional arguments; it is fold\(K=5, sigma=0.08\)"),
        ("then(fold)", r"then: missing a required argument: 'second'; it is then\(first, second, tau=0.2\)"),
        ("increasing(random)", r"increasing: sigma must be a number; it is increasing\(sigma=0.08\)"),
        ("placebo(3)", r"placebo: schedule must be a schedule; it is placebo\(schedule\)"),
        ("fold(True)", "'True' is neither a schedule nor a number"),
        ("fold('5')", "\"'5'\" is neither a schedule nor a number"),
        ("fold(2 + 3)", r"'2 \+ 3' is neither a schedule nor a number"),
        ("fold(*[5])", r"'\*\[5\]' is neither a schedule nor a number"),
        ("fold(K=5, **random)", "keywords must be strings"),
        ("7", "'7' is a number; write e.g. fold"),
        ("-7.5", "'-7.5' is a number; write e.g. fold"),
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
        ("then(fold, random, 0)", "tau = 0 is out of range: expected strictly between 0 and 1"),
        ("then(fold, random, tau=1)", "tau = 1 is out of range: expected strictly between 0 and 1"),
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
    ],
)
def test_nothing_is_executed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        parse(text)
    assert not any(tmp_path.iterdir())
