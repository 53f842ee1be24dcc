"""Measures are what slow loops in float64 find; expressions are arithmetic, and are never executed."""

import math

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from curriculum.measures import MODEL_MEASURES, TEXT_MEASURES, evaluate, model_measures, text_measures, unigram_nll
from data.cli import InputError


def split(values_T, length_N):
    return np.split(np.asarray(values_T, np.float64), np.cumsum(length_N)[:-1])


def mean(values) -> float:
    return math.fsum(values) / len(values)


def slow_model_measures(nll, entropy, varentropy, num_bytes: int) -> dict[str, float]:
    """One segment, from the definitions."""
    return dict(
        nll=mean(nll),
        nll_std=math.sqrt(mean([(s - mean(nll)) ** 2 for s in nll])),
        entropy=mean(entropy),
        entropy_std=math.sqrt(mean([(h - mean(entropy)) ** 2 for h in entropy])),
        varentropy=mean(varentropy),
        sqrt_varentropy=mean([math.sqrt(v) for v in varentropy]),
        entropy_last=entropy[-1],
        varentropy_last=varentropy[-1],
        surprise_gap=mean([s - h for s, h in zip(nll, entropy, strict=True)]),
        surprise_z=math.fsum(nll - entropy) / math.sqrt(math.fsum(varentropy)),
        nll_per_byte=math.fsum(nll) / num_bytes if num_bytes else math.nan,
    )


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), seed=st.integers(0, 10**6))
def test_measures_of_a_model_are_those_of_a_slow_loop(lengths, seed):
    rng = np.random.default_rng(seed)
    length_N = np.array(lengths, np.int32)
    nll_T, entropy_T, varentropy_T = rng.gamma(2.0, 1.5, (3, sum(lengths))).astype(np.float32)
    num_bytes_N = rng.integers(0, 90, len(lengths))
    columns = model_measures(nll_T, entropy_T, varentropy_T, length_N, num_bytes_N)
    assert tuple(columns) == MODEL_MEASURES
    moments = [split(values_T, length_N) for values_T in (nll_T, entropy_T, varentropy_T)]
    expected = [slow_model_measures(*segment) for segment in zip(*moments, num_bytes_N.tolist(), strict=True)]
    for name, column in columns.items():
        assert column.dtype == np.float32
        np.testing.assert_allclose(column, [row[name] for row in expected], rtol=1e-5, atol=1e-6, err_msg=name)


def test_sums_over_long_segments_do_not_lose_digits():
    """A million tokens of 11.0001 nats: summed in float32 the mean would be off in the third digit."""
    nll_T = np.full(1_000_000, 11.0001, np.float32)
    columns = model_measures(nll_T, nll_T, nll_T, np.array([1_000_000]), np.array([1_000_000]))
    assert columns["nll"][0] == columns["nll_per_byte"][0] == nll_T[0]
    assert columns["nll_std"][0] == 0 and columns["surprise_gap"][0] == 0


def test_a_certain_prediction_is_no_division_by_zero():
    zero_T = np.zeros(4)
    columns = model_measures(zero_T, zero_T, zero_T, np.array([3, 1]), np.array([3, 0]))
    assert columns["surprise_z"].tolist() == [0, 0]
    assert columns["nll_per_byte"][0] == 0 and np.isnan(columns["nll_per_byte"][1])


def test_surprise_is_standard_normal_where_the_reference_wrote_the_text():
    """400 segments of 100 tokens, each drawn from a random distribution that the reference knows."""
    rng = np.random.default_rng(0)
    num_segments, length, vocab_size = 400, 100, 20
    p_TV = rng.dirichlet(np.full(vocab_size, 0.7), num_segments * length) + 1e-9
    p_TV /= p_TV.sum(1, keepdims=True)
    token_T = (rng.random((len(p_TV), 1)) > np.cumsum(p_TV, axis=1)[:, :-1]).sum(1)
    nll_T = -np.log(p_TV[np.arange(len(p_TV)), token_T])
    entropy_T = -(p_TV * np.log(p_TV)).sum(1)
    varentropy_T = (p_TV * (np.log(p_TV) + entropy_T[:, None]) ** 2).sum(1)
    length_N = np.full(num_segments, length)
    columns = model_measures(nll_T, entropy_T, varentropy_T, length_N, length_N)
    assert stats.kstest(columns["surprise_z"], "norm").pvalue > 1e-3
    duller = model_measures(0.9 * nll_T, entropy_T, varentropy_T, length_N, length_N)
    assert stats.kstest(duller["surprise_z"], "norm").pvalue < 1e-6


# -- Measures of the text alone


PIECES = (b"a", b"bc", b"the ", b"\xc3", b"")  # the last is BOS: no text


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), seed=st.integers(0, 10**6))
def test_measures_of_a_text_are_those_of_a_slow_loop(lengths, seed):
    rng = np.random.default_rng(seed)
    length_N = np.array(lengths, np.int32)
    target_T = rng.integers(0, len(PIECES), sum(lengths)).astype(np.uint16)
    nll_V = rng.gamma(2.0, 1.0, len(PIECES))
    columns = text_measures(target_T, length_N, PIECES, nll_V)
    assert tuple(columns) == ("num_bytes", *TEXT_MEASURES)
    for i, tokens in enumerate(np.split(target_T.tolist(), np.cumsum(lengths)[:-1])):
        text = b"".join(PIECES[t] for t in tokens)
        packed = zstandard.ZstdCompressor(level=3).compress(text)
        expected = dict(
            num_bytes=len(text),
            length=len(tokens),
            zstd_ratio=len(packed) / len(text) if text else math.nan,
            unigram_nll=mean([nll_V[t] for t in tokens]),
            type_token_ratio=len(set(tokens.tolist())) / len(tokens),
        )
        for name, value in expected.items():
            np.testing.assert_allclose(columns[name][i], value, rtol=1e-6, err_msg=name)


def test_repeats_compress_and_noise_does_not():
    rng = np.random.default_rng(0)
    pieces = tuple(bytes([b]) for b in range(256))
    target_T = np.concatenate([np.tile([3, 1, 4, 1], 100), rng.integers(0, 256, 400)]).astype(np.uint16)
    columns = text_measures(target_T, np.array([400, 400], np.int32), pieces, np.ones(256))
    repeated, noise = columns["zstd_ratio"]
    assert repeated < 0.1 and noise > 1
    assert columns["type_token_ratio"].tolist() == pytest.approx([3 / 400, len(set(target_T[400:])) / 400])


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50))
def test_unigram_frequencies_are_a_distribution_in_the_order_of_the_counts(counts):
    nll_V = unigram_nll(np.array(counts))
    assert np.exp(-nll_V).sum() == pytest.approx(1)
    assert all(nll_V[a] < nll_V[b] for a in range(len(counts)) for b in range(len(counts)) if counts[a] > counts[b])


# -- Expressions


A, B = np.array([1.0, 4.0, 0.25], np.float32), np.array([2, 3, 5], np.int32)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a", A),
        ("a - b", A - B),
        ("a - b - 1", (A - B) - 1),
        ("-a + 2 * b", 2 * B - A),
        ("(a + b) / b ** 2", (A + B) / B**2),
        ("log(a) - sqrt(b)", np.log(A) - np.sqrt(B)),
        ("abs(+a - b) * 1e-3", np.abs(A - B) * 1e-3),
        ("2 ** a", 2**A),
        ("min(a, b, 0.5)", [0.5, 0.5, 0.25]),
        ("max(a, 2 * b)", [4, 6, 10]),
        ("clip(a, 0.5, b)", [1, 3, 0.5]),
        ("clip(log(max(a - 1, 0)), -9, 9)", [-9, np.log(3), -9]),
        ("z(b)", (B - 10 / 3) / np.sqrt(14 / 9)),
        ("0.5 * z(b) + 0.5 * z(-b)", [0, 0, 0]),
        ("rank(a)", [3 / 6, 5 / 6, 1 / 6]),
        ("rank(min(a, 1))", [4 / 6, 4 / 6, 1 / 6]),
        ("resid(b, b)", [0, 0, 0]),
        ("resid(a, 0 * b + 1)", A - 1.75),
    ],
)
def test_an_expression_is_arithmetic_over_columns(expression, expected):
    found = evaluate(expression, {"a": A, "b": B})
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_expressions_are_reckoned_in_double_precision():
    large = np.array([2**24 + 2], np.float32)
    assert evaluate("a + 1 - a", {"a": large}).tolist() == [1.0]


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("c", "no column 'c'; there are a, b"),
        ("a - nll", "no column 'nll'; there are a, b"),
        ("1 + 2", "names no column: every segment would get the same value"),
        ("a +", "is not an expression; write e.g. entropy"),
        ("", "is not an expression"),
        ("a = b", "is not an expression"),
        ("a < b", "'a < b' is not a column, a number"),
        ("a % b", "'a % b' is not a column, a number"),
        ("~a", "'~a' is not a column, a number"),
        ("True * a", "'True' is not a column, a number"),
        ("'a'", "\"'a'\" is not a column, a number"),
        ("exp(a)", r"'exp\(a\)' is not .* or one of log, sqrt, abs"),
        ("log(a, b)", r"log: too many positional arguments; it is log\(x\)$"),
        ("clip(a, 1)", r"clip: missing a required argument: 'hi'; it is clip\(x, lo, hi\)$"),
        ("min(a)", r"min: missing a required argument: 'y'; it is min\(x, y, \*more\)$"),
        ("resid(a)", r"resid: missing a required argument: 'x'; it is resid\(y, x, \*more\)$"),
        ("z(a, fit=b)", r"'z\(a, fit=b\)' is not"),
        ("z(*a)", r"'\*a' is not"),
        ("z(3) + a", "'3' names no column"),
        ("clip(a, 2, 1)", r"clip\(x, lo, hi\) has a lo above its hi: expected lo <= hi"),
        ("-" * 300 + "a", "is nested 302 levels deep; expected at most 200"),
        ("a" + "-a" * 600, "1201 characters long; expected at most 1000"),
        ("a\0", "is not an expression"),
        ("a.T", r"'a\.T' is not"),
        ("a[0]", r"'a\[0\]' is not"),
        ("a if b else a", "'a if b else a' is not"),
    ],
)
def test_anything_else_is_refused(expression, sentence):
    with pytest.raises(InputError, match=sentence):
        evaluate(expression, {"a": A, "b": B})


@pytest.mark.parametrize(
    "expression", ["__import__('os').mkdir('ran')", "open('ran', 'w')", "log(open('ran', 'w'))", "(lambda: a)()"]
)
def test_nothing_is_executed(expression, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        evaluate(expression, {"a": A})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("a", "is NaN or infinite for 2 of 4 segments .the first is segment 1"),
        ("0 * a", "is NaN or infinite for 2 of 4"),
        ("1 / b", "is NaN or infinite for 1 of 4 segments .the first is segment 2"),
        ("log(b)", "is NaN or infinite for 2 of 4 segments .the first is segment 2"),
        ("sqrt(b)", "is NaN or infinite for 1 of 4 segments .the first is segment 3"),
        ("b / 0", "is NaN or infinite for 4 of 4"),
        ("z(a)", "'a' is NaN or infinite for 2 of 4 segments .the first is segment 1"),
        ("b + rank(log(b))", r"'log\(b\)' is NaN or infinite for 2 of 4 segments .the first is segment 2"),
        ("resid(b, 1 / b)", "'1 / b' is NaN or infinite for 1 of 4 segments .the first is segment 2"),
    ],
)
def test_a_segment_that_cannot_be_sorted_is_never_placed(expression, sentence):
    columns = {"a": np.array([1.0, np.nan, 2.0, np.inf]), "b": np.array([1.0, 2.0, 0.0, -1.0])}
    with pytest.raises(InputError, match=sentence):
        evaluate(expression, columns)


# -- Functions of all segments


def drawn(seed: int, num_segments: int) -> dict[str, np.ndarray]:
    """Three columns with ties, of very different scales, depending on each other."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 30, num_segments)
    entropy = np.round(3 - 0.4 * np.log(length) + rng.normal(size=num_segments), 1).astype(np.float32)
    return {"length": length, "entropy": entropy, "nll": (1e4 * entropy + rng.normal(size=num_segments))}


@given(num_segments=st.integers(2, 60), seed=st.integers(0, 10**6))
def test_ranks_are_those_of_scipy_with_ties_averaged(num_segments, seed):
    columns = drawn(seed, num_segments)
    found = evaluate("rank(entropy)", columns)
    np.testing.assert_allclose(found, (stats.rankdata(columns["entropy"]) - 0.5) / num_segments)
    assert 0 < found.min() and found.max() < 1


@given(num_segments=st.integers(2, 60), seed=st.integers(0, 10**6))
def test_z_has_mean_0_and_spread_1(num_segments, seed):
    found = evaluate("z(nll)", drawn(seed, num_segments))
    assert found.mean() == pytest.approx(0, abs=1e-9) and found.std() == pytest.approx(1)


@given(num_segments=st.integers(10, 60), seed=st.integers(0, 10**6))
def test_a_residual_is_independent_of_what_was_fitted_and_of_its_units(num_segments, seed):
    columns = drawn(seed, num_segments)
    found = evaluate("resid(nll, log(length), length)", columns)
    assert found.mean() == pytest.approx(0, abs=1e-6)
    for regressor in (np.log(columns["length"]), columns["length"]):
        assert abs(found @ (regressor - regressor.mean())) < 1e-8 * np.abs(columns["nll"]).max() * num_segments * 30
    # The normal equations, intercept included, solved by themselves.
    design_NK = np.column_stack([np.ones(num_segments), np.log(columns["length"]), columns["length"]])
    fitted, *_ = np.linalg.lstsq(design_NK, columns["nll"])
    np.testing.assert_allclose(found, columns["nll"] - design_NK @ fitted, atol=1e-5)
    other = evaluate("resid(nll, 1e9 * log(length) - 7, 1e-9 * length)", columns)
    np.testing.assert_allclose(other, found, atol=1e-5)


@pytest.mark.parametrize(
    "expression", ["z(entropy)", "rank(nll) - z(length)", "resid(entropy, log(length))", "entropy + 1"]
)
def test_validation_is_measured_as_training_was(expression):
    """Or a bin would mean two things: fitted on the basis, equal segments get equal values in both."""
    train, val = drawn(0, 80), drawn(1, 30)
    train_N = evaluate(expression, train)
    again = {name: column[:9] for name, column in train.items()}
    np.testing.assert_allclose(evaluate(expression, again, basis=train), train_N[:9], atol=1e-9)
    val_V = evaluate(expression, val, basis=train)
    assert len(val_V) == 30
    if expression != "entropy + 1":
        assert np.abs(val_V - evaluate(expression, val)).max() > 1e-3
    one_by_one = [evaluate(expression, {n: c[i : i + 1] for n, c in val.items()}, train)[0] for i in range(30)]
    np.testing.assert_allclose(one_by_one, val_V, atol=1e-9)


def test_the_basis_must_have_the_columns_too():
    with pytest.raises(InputError, match="no column 'b'; there are a$"):
        evaluate("a - b", {"a": A, "b": B}, basis={"a": A})
    with pytest.raises(InputError, match="infinite for 1 of 6 segments .the first is segment 2"):
        evaluate("a / b", {"a": A, "b": np.array([1, 1, 0])}, basis={"a": A, "b": B})


@pytest.mark.parametrize("expression", ["a + 1 / 0", "a * 9 ** 999", "a * (-1) ** 0.5"])
def test_constants_that_come_to_nothing_are_refused_too(expression):
    with pytest.raises(InputError, match="is NaN or infinite"):
        evaluate(expression, {"a": A})


def test_what_has_no_value_can_be_given_one():
    columns = {"zstd_ratio": np.array([0.4, np.nan, 0.6], np.float32)}
    np.testing.assert_allclose(evaluate("fill(zstd_ratio, 1)", columns), [0.4, 1, 0.6], rtol=1e-6)
    assert evaluate("z(fill(zstd_ratio, 0.5))", columns)[1] == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match=r"'log\(fill\(zstd_ratio, 0\)\)' is NaN or infinite for 1 of 3 .* as in fill"):
        evaluate("log(fill(zstd_ratio, 0))", columns)
