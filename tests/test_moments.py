"""The one-pass reduction against float64 over full logits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curriculum.moments import softcapped, tanh_capped, token_moments


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


def check(logits_NV, target_N, *, rtol=1e-4, atol=1e-6, **options):
    hidden, head = as_head(logits_NV)
    found = token_moments(hidden, head, torch.tensor(target_N), **options)
    for name, ours, exact in zip(found._fields, found, oracle(logits_NV, target_N), strict=True):
        np.testing.assert_allclose(ours.numpy(), exact, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("vocab, columns", [(1000, 1024), (1024, 256), (1003, 256), (257, 1), (50, 7)])
def test_any_offset_and_chunk(offset, vocab, columns):
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(0, 3, (40, vocab)) + offset)
    check(logits, rng.integers(0, vocab, 40), columns=columns, rows=16)


@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
def test_limits(offset):
    """A certain row has neither entropy nor varentropy; a uniform one has ln V and none."""
    certain = np.full((1, 300), -90.0)
    certain[0, 7] = 90.0
    check(np.float32(certain + offset), np.array([7]), columns=64)
    uniform = np.full((1, 300), 3.0 + offset, np.float32)
    # 1e-5 absolute: E[y^2] - E[y]^2 of a flat row cancels to rounding error.
    check(uniform, np.array([299]), columns=64, atol=1e-5)


def test_masked_columns_have_no_probability():
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
        found = token_moments(hidden, head, torch.tensor(target), bias_V=bias, columns=64)
        for ours, exact in zip(found, oracle(logits, target), strict=True):
            np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-4, atol=1e-6)


def test_columns_beyond_the_vocabulary_take_no_part():
    rng = np.random.default_rng(2)
    logits = np.float32(rng.normal(0, 2, (8, 128)))
    hidden, head = as_head(logits)
    head[100:] = 1e3
    found = token_moments(hidden, head, torch.arange(8), vocab_size=100, columns=33)
    for ours, exact in zip(found, oracle(logits[:, :100], np.arange(8)), strict=True):
        np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-4)


@pytest.mark.parametrize("kind, function", [("rsqrt", softcapped), ("tanh", tanh_capped)])
def test_caps_come_before_the_reduction(kind, function):
    rng = np.random.default_rng(3)
    logits = np.float32(rng.normal(0, 30, (8, 200)))
    capped = function(torch.tensor(logits, dtype=torch.float64), 15.0).numpy()
    assert np.abs(capped).max() < 15.0 < np.abs(logits).max()
    hidden, head = as_head(logits)
    found = token_moments(hidden, head, torch.arange(8), cap=15.0, cap_kind=kind, columns=64)
    for ours, exact in zip(found, oracle(capped, np.arange(8)), strict=True):
        np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-4)


def test_bf16_operands_are_not_rounded_again():
    """Moments of bf16 hidden states and head equal those of the same numbers in fp32."""
    torch.manual_seed(0)
    hidden, head = torch.randn(32, 64).bfloat16(), (8 * torch.randn(500, 64)).bfloat16()
    target = torch.arange(32)
    exact = oracle((hidden.double() @ head.double().T).numpy(), target.numpy())
    for ours, expected in zip(token_moments(hidden, head, target), exact, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 30), st.sampled_from([0.1, 3.0, 20.0]))
def test_chunking_never_matters(seed, columns, rows, scale):
    rng = np.random.default_rng(seed)
    logits = np.float32(rng.normal(rng.uniform(-100, 100), scale, (9, 61)))
    check(logits, rng.integers(0, 61, 9), columns=columns, rows=rows, atol=2e-5)
