"""Entropy, varentropy and NLL of every token in one pass over the vocabulary.

    N tokens   D hidden width   V vocabulary   C columns of one chunk

Nothing of size [N, V] is ever held. The head is applied C columns at a time and each row keeps four numbers
relative to its running maximum m, with y = logit - m:

    s = sum e^y        a = sum y e^y        b = sum y^2 e^y

A chunk with another maximum is merged with D = m_old - m_new <= 0 and r = e^D (old values on the right):

    b <- r (b + 2 D a + D^2 s)      a <- r (a + D s)      s <- r s

and at the end lse = m + ln s, H = ln s - a/s, V = b/s - (a/s)^2, NLL = lse - logit_target, all in nats.

Precision: shifting by the maximum is enough in fp32 (unshifted second moments lose 21-100 % of V on peaked rows),
but logits rounded to bf16 before the reduction are not (H off by up to 0.35): the product is accumulated and kept
in fp32, whatever the type of its operands.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# 2,048 x 1,024 fp32 logits are 8 MiB: they stay in a CPU's last-level cache between product and reduction.
ROWS, COLUMNS = 2048, 1024
LEAST = -1e4  # exp(-1e4) is exactly 0 in fp32, and 0 * (-1e4)^2 is 0 where 0 * inf would be NaN


class Moments(NamedTuple):
    """Of N predictions, fp32, nats."""

    nll_N: Tensor  # surprisal of the true next token, -ln p(target)
    entropy_N: Tensor  # of the prediction, -sum p ln p
    varentropy_N: Tensor  # variance of the surprisal under the prediction (nats^2)


def softcapped(logits: Tensor, cap: float) -> Tensor:
    """Squash logits smoothly into (-cap, cap): c x / sqrt(x^2 + c^2). cap = 0 leaves them as they are."""
    return logits * torch.rsqrt(1 + (logits / cap) ** 2) if cap else logits


def tanh_capped(logits: Tensor, cap: float) -> Tensor:
    """Gemma's squashing: c tanh(x / c)."""
    return cap * torch.tanh(logits / cap) if cap else logits


CAPS = {"rsqrt": softcapped, "tanh": tanh_capped}


def token_moments(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    vocab_size: int | None = None,
    cap: float = 0.0,
    cap_kind: str = "rsqrt",
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> Moments:
    """Moments of softmax(cap(hidden @ head.T + bias)) for every row.

    hidden (N, D) and head (V, D) may be fp32 or bf16; target (N,) int64 in 0..vocab_size-1. Columns at and beyond
    `vocab_size` (padding of the head) take no part. A logit of -inf is a probability of exactly 0.
    Extra memory: about 3 x rows x columns fp32, whatever N and V.
    """
    vocab_size = vocab_size or head_VD.shape[0]
    parts = []
    for at in range(0, hidden_ND.shape[0], rows):
        hidden, target = hidden_ND[at : at + rows], target_N[at : at + rows]
        parts.append(_row_block(hidden, head_VD, target, bias_V, vocab_size, CAPS[cap_kind], cap, columns))
    return Moments(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _row_block(hidden, head_VD, target_N, bias_V, vocab_size, apply_cap, cap, columns) -> Moments:
    max_N = hidden.new_full(hidden.shape[:1], -torch.inf, dtype=torch.float32)
    s_N, a_N, b_N, target_logit_N = (torch.zeros_like(max_N) for _ in range(4))
    for low in range(0, vocab_size, columns):
        high = min(low + columns, vocab_size)
        logits_NC = _product(hidden, head_VD[low:high])
        if bias_V is not None:
            logits_NC += bias_V[low:high].float()
        if cap:
            logits_NC = apply_cap(logits_NC, cap)

        column_N = target_N - low
        inside_N = (column_N >= 0) & (column_N < high - low)
        picked_N = logits_NC.gather(1, column_N.clamp(0, high - low - 1)[:, None])[:, 0]
        target_logit_N = torch.where(inside_N, picked_N, target_logit_N)

        old_max_N, max_N = max_N, torch.maximum(max_N, logits_NC.amax(1))
        # A row that has met only -inf so far has no finite maximum to shift by: any finite number will do.
        shift_N = max_N.masked_fill(max_N == -torch.inf, 0.0)
        D_N = (old_max_N - shift_N).clamp_(min=LEAST)
        r_N = D_N.exp()
        b_N = r_N * (b_N + 2 * D_N * a_N + D_N**2 * s_N)
        a_N = r_N * (a_N + D_N * s_N)
        s_N = r_N * s_N
        y_NC = logits_NC.sub_(shift_N[:, None]).clamp_(min=LEAST)
        e_NC = y_NC.exp()
        s_N = s_N + e_NC.sum(1)
        ye_NC = e_NC.mul_(y_NC)
        a_N = a_N + ye_NC.sum(1)
        b_N = b_N + ye_NC.mul_(y_NC).sum(1)
    mean_N = a_N / s_N
    log_s_N = s_N.log()
    return Moments(
        nll_N=log_s_N + max_N - target_logit_N,
        entropy_N=(log_s_N - mean_N).clamp_(min=0),
        varentropy_N=(b_N / s_N - mean_N**2).clamp_(min=0),
    )


def _product(hidden_ND: Tensor, head_CD: Tensor) -> Tensor:
    """hidden @ head.T in fp32, also for bf16 operands: a bf16 result would cost up to 0.35 nats of entropy."""
    if hidden_ND.dtype == torch.float32:
        return hidden_ND @ head_CD.float().T
    if hidden_ND.is_cuda:
        return torch.mm(hidden_ND, head_CD.T, out_dtype=torch.float32)
    return hidden_ND.float() @ head_CD.float().T  # no CPU kernel takes bf16 in and gives fp32 out
