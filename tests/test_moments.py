"""The one-pass reduction against float64 over full logits, by every backend.

The Triton kernel runs on CUDA (marker gpu), and without a GPU through Triton's interpreter where triton is installed:

    TRITON_INTERPRET=1 python -m pytest tests/test_moments.py -k triton
"""

import os
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from curriculum import moments
from curriculum.moments import softcapped, tanh_capped, token_moments

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
NO_GPU = not torch.cuda.is_available()
EVERY = [
    "eager",
    "compiled",
    pytest.param("native", marks=pytest.mark.skipif(which("cc") is None, reason="no C compiler")),
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs triton, TRITON_INTERPRET=1")),
    pytest.param("eager-cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="no CUDA")]),
    pytest.param("compiled-cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="no CUDA")]),
    pytest.param(
        "triton-cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU or not HAS_TRITON or INTERPRETED, reason="no CUDA, triton")],
    ),
]


@pytest.fixture(params=EVERY)
def compute(request):
    """token_moments by one backend, wherever that runs; tensors in and out on the CPU."""
    backend, _, device = request.param.partition("-")
    moments._cannot_compile.clear()

    def run(*tensors, bias_V=None, **options):
        tensors = [tensor.to(device or "cpu") for tensor in tensors]
        bias_V = bias_V if bias_V is None else bias_V.to(device or "cpu")
        found = token_moments(*tensors, bias_V=bias_V, backend=backend, **options)
        return moments.Moments(*(column.cpu() for column in found))

    # Tests need more shapes than the 8 that torch compiles of one function; nearly all reduce 8 x 64, to need few.
    with import_module("torch._dynamo").config.patch(recompile_limit=64):
        yield run
    assert not moments._cannot_compile, "fell back to eager: not the backend that was to be tested"


def oracle(logits_NV: np.ndarray, target_N: np.ndarray):
    """NLL, entropy, varentropy from full logits, in float64, by their definitions."""
    logits = logits_NV.astype(np.float64)
    top = logits.max(1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
    p = np.exp(logp)
    finite = np.where(p > 0, logp, 0.0)
    entropy = -(p * finite).sum(1)
    varentropy = (p * (finite + entropy[:, None]) ** 2).sum(1)
    return -logp[np.arange(len(logits)), target_N], entropy, varentropy


def as_head(logits_NV: np.ndarray):
    """Hidden states and a head whose product is exactly `logits_NV`: one-hot rows pick columns."""
    return torch.eye(len(logits_NV)), torch.tensor(logits_NV.T.copy(), dtype=torch.float32)


def check(logits_NV, target_N, *, compute=token_moments, rtol=1e-4, atol=1e-6, **options):
    hidden, head = as_head(logits_NV)
    found = compute(hidden, head, torch.tensor(target_N), **options)
    for name, ours, exact in zip(found._fields, found, oracle(logits_NV, target_N), strict=True):
        np.testing.assert_allclose(ours.numpy(), exact, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("vocab, columns", [(1000, 1024), (1024, 256), (1003, 256), (257, 1), (50, 7)])
def test_any_offset_and_chunk(offset, vocab, columns):
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(0, 3, (40, vocab)) + offset)
    check(logits, rng.integers(0, vocab, 40), columns=columns, rows=16)


@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
def test_limits(offset, compute):
    """A certain row has neither entropy nor varentropy; a uniform one has ln V and none."""
    certain = np.full((8, 300), -90.0)
    certain[:, 7] = 90.0
    check(np.float32(certain + offset), np.full(8, 7), columns=64, compute=compute)
    uniform = np.full((8, 300), 3.0 + offset, np.float32)
    # 1e-5 absolute: E[y^2] - E[y]^2 of a flat row cancels to rounding error.
    check(uniform, np.full(8, 299), columns=64, atol=1e-5, compute=compute)


def test_masked_columns_have_no_probability(compute):
    """-inf in part of a chunk, in the whole first chunk, in the whole last one."""
    rng = np.random.default_rng(1)
    for masked in (slice(3, 9), slice(0, 64), slice(192, 256), slice(0, 250)):
        logits = np.float32(rng.normal(0, 2, (8, 256)))
        logits[:, masked] = -np.inf
        allowed = np.flatnonzero(np.isfinite(logits[0]))
        # The product of a head with -inf and one-hot rows is 0 * -inf = NaN, so the mask comes in as the bias.
        hidden, head = as_head(np.where(np.isfinite(logits), logits, 0))
        bias = torch.tensor(np.where(np.isfinite(logits[0]), 0, -np.inf), dtype=torch.float32)
        target = rng.choice(allowed, 8)
        found = compute(hidden, head, torch.tensor(target), bias_V=bias, columns=64)
        for ours, exact in zip(found, oracle(logits, target), strict=True):
            np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-4, atol=1e-6)


def test_columns_beyond_the_vocabulary_take_no_part(compute):
    rng = np.random.default_rng(2)
    logits = np.float32(rng.normal(0, 2, (8, 128)))
    hidden, head = as_head(logits)
    head[100:] = 1e3
    found = compute(hidden, head, torch.arange(8), vocab_size=100, columns=64)
    for ours, exact in zip(found, oracle(logits[:, :100], np.arange(8)), strict=True):
        np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-4)


@pytest.mark.parametrize("kind, function", [("rsqrt", softcapped), ("tanh", tanh_capped)])
def test_caps_come_before_the_reduction(kind, function, compute):
    rng = np.random.default_rng(3)
    logits = np.float32(rng.normal(0, 30, (8, 200)))
    capped = function(torch.tensor(logits, dtype=torch.float64), 15.0).numpy()
    assert np.abs(capped).max() < 15.0 < np.abs(logits).max()
    hidden, head = as_head(logits)
    found = compute(hidden, head, torch.arange(8), cap=15.0, cap_kind=kind, columns=64)
    for ours, exact in zip(found, oracle(capped, np.arange(8)), strict=True):
        np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-4)


def test_a_bias_comes_before_the_cap(compute):
    rng = np.random.default_rng(4)
    logits, bias = np.float32(rng.normal(0, 20, (8, 200))), np.float32(rng.normal(0, 10, 200))
    exact = oracle(tanh_capped(torch.tensor(logits + bias, dtype=torch.float64), 30.0).numpy(), np.arange(8))
    hidden, head = as_head(logits)
    found = compute(hidden, head, torch.arange(8), bias_V=torch.tensor(bias), cap=30.0, cap_kind="tanh", columns=64)
    for ours, expected in zip(found, exact, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("width", [64, 100])
def test_bf16_operands_are_not_rounded_again(width, compute, request):
    """Moments of bf16 hidden states and head equal those of the same numbers in fp32; any hidden width."""
    if request.node.callspec.params["compute"] == "triton":
        pytest.skip("Triton's interpreter multiplies the bits of bf16 numbers as integers")
    torch.manual_seed(0)
    hidden, head = torch.randn(8, width).bfloat16(), (8 * torch.randn(500, width)).bfloat16()
    target = torch.arange(8)
    exact = oracle((hidden.double() @ head.double().T).numpy(), target.numpy())
    for ours, expected in zip(compute(hidden, head, target, columns=64), exact, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, -100.0])
def test_a_vocabulary_and_rows_that_fill_no_tile(offset, compute):
    """Rows and columns left over at every edge of every backend's tiles, in one call of several tiles."""
    rng = np.random.default_rng(5)
    hidden, head = rng.normal(0, 1, (150, 41)), rng.normal(0, 0.5, (1003, 41))
    hidden, head = (torch.tensor(x, dtype=torch.float32) for x in (hidden, head))
    hidden, head = F.pad(hidden, (0, 1), value=1.0), F.pad(head, (0, 1), value=offset)
    target = torch.tensor(rng.integers(0, 1003, 150))
    exact = oracle((hidden.double() @ head.double().T).numpy(), target.numpy())
    for ours, expected in zip(compute(hidden, head, target, rows=64, columns=64), exact, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_row_is_nan_and_stays_alone(broken, compute):
    """A NaN or an infinite logit must never end as a plausible number; -inf is a probability of 0."""
    rng = np.random.default_rng(6)
    logits = np.float32(rng.normal(0, 2, (8, 300)))
    for column in (0, 150, 299):
        hidden, head = torch.tensor(logits), torch.eye(300)
        hidden[3, column] = broken  # makes the whole row NaN, as 0 * inf is
        for ours, exact in zip(
            compute(hidden, head, torch.arange(8), columns=64), oracle(logits, np.arange(8)), strict=True
        ):
            assert torch.isnan(ours).tolist() == [i == 3 for i in range(8)]
            np.testing.assert_allclose(np.delete(ours.numpy(), 3), np.delete(exact, 3), rtol=1e-4)


@pytest.mark.skipif(which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_native_reduction_finds_one_bad_logit(value):
    """One column is enough, in any lane; found among the bits, as -ffast-math knows no NaN. -inf takes no part."""
    rng = np.random.default_rng(7)
    for column in range(64):
        logits = torch.tensor(rng.normal(0, 3, (3, 64)), dtype=torch.float32)
        logits[1, column] = value
        out = torch.empty(4, 3)
        moments._Native(0.0, "rsqrt")(logits, None, None, out)
        assert out[1:].isfinite().all(0).tolist() == [True, np.isneginf(value), True]
        y = logits[:, np.arange(64) != column].double()
        y -= y.amax(1, keepdim=True)
        rows = [1] if np.isneginf(value) else []
        torch.testing.assert_close(out[2, rows], (y * y.exp()).sum(1).float()[rows], rtol=1e-5, atol=0)


def test_small_jobs_are_not_compiled(monkeypatch):
    def chosen(rows, columns, device="cuda"):
        hidden = SimpleNamespace(shape=(rows, 768), device=torch.device(device))
        return moments.auto_backend(hidden, torch.empty(columns, 768, device="meta"))

    assert chosen(2048, 50304) == "compiled"
    assert chosen(100, 50304) == chosen(2048, 500) == "eager"
    monkeypatch.setattr(moments, "_library", lambda: None)
    assert chosen(2048, 50304, "cpu") == "eager"


def test_without_a_c_compiler_eager_takes_over(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    moments._library.cache_clear()
    try:
        assert moments.device_backend("cpu") == moments.device_backend("cpu") == "eager"
        check(np.float32(np.random.default_rng(8).normal(0, 3, (5, 70))), np.arange(5))
        assert capsys.readouterr().out.count("no C compiler") == 1
    finally:
        moments._library.cache_clear()


@pytest.mark.skipif(which("cc") is None, reason="no C compiler")
def test_the_native_library_leaves_the_processors_modes_alone():
    """A library linked with -ffast-math flushes subnormal numbers to zero for the whole process that loads it."""
    assert moments._library() and 5e-324 * np.float64(1) > 0 and np.float64(1e-310) / 2 > 0


def test_where_compiling_is_impossible_eager_takes_over(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no C++ compiler\nmore of it")

    monkeypatch.setattr(moments, "_compiled", lambda: (broken, broken))
    monkeypatch.setattr(moments, "_cannot_compile", set())
    hidden, head, target, bias = torch.randn(40, 8), torch.randn(100, 8), torch.arange(40), torch.randn(100)
    for _ in range(2):
        found = token_moments(hidden, head, target, bias_V=bias, rows=16, columns=64, backend="compiled")
        for ours, eager in zip(found, token_moments(hidden, head, target, bias_V=bias, backend="eager"), strict=True):
            np.testing.assert_allclose(ours, eager, rtol=1e-5)
    said = capsys.readouterr().out
    assert said.count("note:") == 1 and "no C++ compiler" in said


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="eager"):
        token_moments(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), backend="fast")


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 30), st.sampled_from([0.1, 3.0, 20.0]))
def test_chunking_never_matters(seed, columns, rows, scale):
    rng = np.random.default_rng(seed)
    logits = np.float32(rng.normal(rng.uniform(-100, 100), scale, (9, 61)))
    check(logits, rng.integers(0, 61, 9), columns=columns, rows=rows, atol=2e-5)
