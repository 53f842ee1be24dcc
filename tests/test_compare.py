"""The comparison is scipy's Welch test and statsmodels' Holm correction, the right way round, and the textbook's."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from curriculum.compare import compare, markdown


def rows_of(losses: dict, baseline: str = "random") -> dict:
    return {row.name: row for row in compare(losses, baseline)}


# Losses are multiples of 0.01, as distinct as real ones: scipy warns where a spread is lost in rounding.
samples = st.lists(st.integers(250, 350), min_size=2, max_size=7, unique=True).map(lambda xs: np.array(xs) / 100)


def test_two_runs_each_worked_out_by_hand():
    """Means 3.1 and 2.9, variances 0.02: t = -0.2 / sqrt(0.01 + 0.01) = -sqrt 2 with 2 degrees of freedom, where
    Student's distribution function is 1/2 + t / (2 sqrt(2 + t^2)) and its 97.5 % point 4.30265."""
    rows = rows_of({"random": np.array([3.0, 3.2]), "up": np.array([2.8, 3.0])})
    up = rows["up"]
    assert (up.n, up.mean, up.sd) == (2, pytest.approx(2.9), pytest.approx(math.sqrt(0.02)))
    assert up.difference == pytest.approx(-0.2)
    assert up.p == up.p_holm == pytest.approx(0.5 - math.sqrt(2) / 4)
    assert (up.low, up.high) == pytest.approx((-0.2 - 4.30265 * 0.02**0.5, -0.2 + 4.30265 * 0.02**0.5), abs=1e-5)
    random = rows["random"]
    assert (random.mean, random.difference, random.low, random.high, random.p) == (pytest.approx(3.1), *[None] * 4)


@settings(max_examples=6)
@given(samples, st.lists(samples, min_size=1, max_size=4))
def test_it_is_scipys_and_statsmodels_test(base, others):
    arms = {f"arm{i}": losses for i, losses in enumerate(others)}
    rows = rows_of({**arms, "random": base})
    p = [stats.ttest_ind(losses, base, equal_var=False, alternative="less").pvalue for losses in others]
    np.testing.assert_allclose([rows[name].p for name in arms], p, rtol=1e-12)
    np.testing.assert_allclose([rows[name].p_holm for name in arms], multipletests(p, method="holm")[1], rtol=1e-12)


@settings(max_examples=6)
@given(samples, samples)
def test_it_is_welchs_test_as_the_textbook_has_it(base, losses):
    up = rows_of({"random": base, "up": losses})["up"]
    of_each = [np.var(x, ddof=1) / len(x) for x in (losses, base)]
    error = math.sqrt(sum(of_each))
    freedom = sum(of_each) ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(of_each, (losses, base), strict=True))
    difference = losses.mean() - base.mean()
    margin = stats.t.ppf(0.975, freedom) * error
    assert up.p == pytest.approx(stats.t.cdf(difference / error, freedom), rel=1e-9)
    assert (up.low, up.high) == pytest.approx((difference - margin, difference + margin), rel=1e-9)


@settings(max_examples=6)
@given(st.lists(samples, min_size=2, max_size=5))
def test_holm_multiplies_the_smallest_p_most_and_never_reorders(others):
    rows = rows_of({"random": np.array([2.9, 3.0, 3.2])} | {f"arm{i}": x for i, x in enumerate(others)})
    tested = sorted((row for row in rows.values() if row.p is not None), key=lambda row: row.p)
    expected, largest = [], 0.0
    for rank, row in enumerate(tested):
        largest = max(largest, min(1.0, row.p * (len(tested) - rank)))
        expected.append(largest)
    assert [row.p_holm for row in tested] == pytest.approx(expected)


def test_a_lower_loss_is_better():
    base, spread = 3.0, np.array([-0.01, 0.0, 0.01])
    rows = rows_of({"random": base + spread, "better": base - 0.1 + spread, "worse": base + 0.1 + spread})
    assert rows["better"].p < 0.001 < 0.999 < rows["worse"].p
    assert rows["better"].high < 0 < rows["worse"].low
    assert (rows["better"].difference, rows["worse"].difference) == pytest.approx((-0.1, 0.1))


# -- What cannot be tested


def test_of_one_run_there_is_a_mean_and_no_test():
    rows = rows_of({"random": np.array([3.0, 3.1]), "up": np.array([2.9])})
    up = rows["up"]
    assert (up.n, up.mean, up.difference) == (1, 2.9, pytest.approx(-0.15))
    assert [up.sd, up.low, up.high, up.p, up.p_holm] == [None] * 5


def test_against_a_single_baseline_run_nothing_is_tested():
    rows = rows_of({"random": np.array([3.0]), "up": np.array([2.9, 2.8])})
    assert rows["up"].sd is not None and rows["random"].sd is None
    assert [rows["up"].low, rows["up"].p, rows["up"].p_holm] == [None] * 3


def test_an_arm_that_was_not_tested_takes_no_part_in_the_correction():
    base, up = np.array([3.0, 3.1, 3.3]), np.array([2.9, 3.0, 3.0])
    alone = rows_of({"random": base, "up": up})["up"]
    beside = rows_of({"random": base, "up": up, "single": np.array([2.5])})["up"]
    assert beside.p_holm == alone.p_holm == alone.p


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
def test_two_arms_without_any_spread_and_difference_are_not_tested():
    rows = rows_of({"random": np.array([3.0, 3.0]), "up": np.array([3.0, 3.0]), "down": np.array([3.1, 3.4])})
    assert [rows["up"].p, rows["up"].p_holm, rows["up"].low, rows["up"].high] == [None] * 4
    assert (rows["up"].sd, rows["up"].difference) == (0, 0)
    assert rows["down"].p == rows["down"].p_holm  # the only test made


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
def test_a_difference_without_any_spread_is_no_certainty():
    up = rows_of({"random": np.array([3.0, 3.0]), "up": np.array([2.9, 2.9])})["up"]
    assert up.p is None and up.low is None


# -- The table


def test_the_baseline_comes_first_and_the_others_by_mean():
    losses = {
        "b": np.array([3.3, 3.2]),
        "a": np.array([2.7, 2.9]),
        "random": np.array([3.9, 4.1]),
        "c": np.array([3.0]),
    }
    assert [row.name for row in compare(losses, "random")] == ["random", "a", "c", "b"]
    assert [row.name for row in compare(losses, "a")] == ["a", "c", "b", "random"]


def test_the_table_has_a_row_for_every_arm_with_its_n():
    losses = {"random": np.array([3.0, 3.2]), "up": np.array([2.8, 3.0]), "single": np.array([2.5])}
    lines = markdown(compare(losses, "random")).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {len(row) for row in cells} == {8} and len(cells) == 2 + 3
    assert cells[2] == ["random", "2", "3.1000", "0.1414", "–", "–", "–", "–"]
    assert cells[3] == ["single", "1", "2.5000", "–", "-0.6000", "–", "–", "–"]
    assert cells[4] == ["up", "2", "2.9000", "0.1414", "-0.2000", "-0.8085 … +0.4085", "0.146", "0.146"]
