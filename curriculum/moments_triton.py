"""The product with the head and its reduction in one Triton kernel: logits never leave the chip.

    N rows   D hidden width   V vocabulary   K parts of the vocabulary   ROWS x COLUMNS logits held at once

One program walks over one part of the vocabulary for ROWS rows. It multiplies ROWS x WIDTH by WIDTH x COLUMNS pieces
(bf16 or fp32 operands, fp32 accumulator), then folds the finished tile into the five numbers it keeps for each row,
as `curriculum.moments` defines them. Splitting the vocabulary over K programs keeps all multiprocessors busy also
when there are few rows; the parts are merged by the caller.

Traps of published kernels of this kind, avoided here: columns beyond the vocabulary that enter as logit 0; a running
maximum that starts at 0 rather than -inf; a hidden width that must be a multiple of 128.

Tested through Triton's interpreter (TRITON_INTERPRET=1), no GPU needed. Its speed has not been measured on a GPU, so
nothing chooses it by itself.
"""

from __future__ import annotations  # tl.constexpr below is read by triton, and absent where triton is

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

CAP_NONE, CAP_RSQRT, CAP_TANH = 0, 1, 2
ROWS, COLUMNS, WIDTH = 128, 128, 64
PROGRAMS = 528  # four for each of an H100's or H200's 132 multiprocessors: the last wave is a small share


def chunk_sums(hidden_ND, head_VD, target_N, bias_V, cap: float, cap_kind: str):
    """(max, s, a, b, target logit) of K parts of the vocabulary, fp32 (5, K, N); the target's logit adds up over K.

    hidden and head: both bf16 or both fp32 (then multiplied without TF32); any strides; V = all columns that count.
    """
    if triton is None:
        raise ImportError("backend triton: the package triton is not installed")
    (num_rows, hidden_width), vocab_size = hidden_ND.shape, head_VD.shape[0]
    if hidden_ND.dtype != head_VD.dtype:
        hidden_ND, head_VD = hidden_ND.float(), head_VD.float()
    row_blocks, tiles = triton.cdiv(num_rows, ROWS), triton.cdiv(vocab_size, COLUMNS)
    tiles_each = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // max(1, row_blocks))))
    parts = triton.cdiv(tiles, tiles_each)
    sums_5KN = hidden_ND.new_empty(5, parts, num_rows, dtype=_float32())
    # Consecutive programs share a part of the vocabulary: the head, the larger operand, is read from L2.
    _jitted()[(row_blocks, parts)](
        hidden_ND,
        head_VD,
        target_N,
        bias_V,
        sums_5KN,
        num_rows,
        vocab_size,
        parts * num_rows,
        *hidden_ND.stride(),
        *head_VD.stride(),
        cap,
        hidden_width,
        tiles_each,
        HAS_BIAS=bias_V is not None,
        CAP={"rsqrt": CAP_RSQRT, "tanh": CAP_TANH}[cap_kind] if cap else CAP_NONE,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        WIDTH=WIDTH,
        num_warps=8,
        num_stages=3,
    )
    return sums_5KN


def _float32():
    import torch

    return torch.float32


def _jitted():
    global _kernel
    if not hasattr(_kernel, "run"):
        _kernel = triton.jit(_kernel)
    return _kernel


def _kernel(
    hidden_ptr,
    head_ptr,
    target_ptr,
    bias_ptr,
    sums_ptr,
    num_rows,
    vocab_size,
    plane,  # numbers in one of the five planes of sums
    hidden_row,  # strides, in elements
    hidden_step,
    head_row,
    head_step,
    cap,
    hidden_width: tl.constexpr,
    tiles_each,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_N = row_N < num_rows
    target_N = tl.load(target_ptr + row_N, mask=is_row_N, other=-1)
    hidden_at_N1 = hidden_ptr + row_N.to(tl.int64)[:, None] * hidden_row
    step_D = tl.arange(0, WIDTH)

    max_N = tl.full((ROWS,), float("-inf"), tl.float32)
    s_N = tl.zeros((ROWS,), tl.float32)
    a_N = tl.zeros((ROWS,), tl.float32)
    b_N = tl.zeros((ROWS,), tl.float32)
    target_logit_N = tl.zeros((ROWS,), tl.float32)

    first = tl.program_id(1) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(vocab_size, COLUMNS))):
        column_C = tile * COLUMNS + tl.arange(0, COLUMNS)
        is_column_C = column_C < vocab_size
        head_at_1C = head_ptr + column_C.to(tl.int64)[None, :] * head_row
        logits_NC = tl.zeros((ROWS, COLUMNS), tl.float32)
        for low in range(0, hidden_width, WIDTH):
            is_step_D = low + step_D < hidden_width
            hidden_NW = tl.load(
                hidden_at_N1 + (low + step_D)[None, :] * hidden_step,
                mask=is_row_N[:, None] & is_step_D[None, :],
                other=0.0,
            )
            head_WC = tl.load(
                head_at_1C + (low + step_D)[:, None] * head_step,
                mask=is_step_D[:, None] & is_column_C[None, :],
                other=0.0,
            )
            logits_NC = tl.dot(hidden_NW, head_WC, logits_NC, input_precision="ieee")
        if HAS_BIAS:
            logits_NC += tl.load(bias_ptr + column_C, mask=is_column_C, other=0.0)[None, :]
        if CAP == 1:
            scaled_NC = logits_NC / cap
            logits_NC = logits_NC * tl.rsqrt(1 + scaled_NC * scaled_NC)
        if CAP == 2:  # tanh x = 2 sigmoid(2x) - 1
            logits_NC = cap * (2 * tl.sigmoid(2 * logits_NC / cap) - 1)
        is_target_NC = column_C[None, :] == target_N[:, None]
        target_logit_N += tl.sum(tl.where(is_target_NC, logits_NC, 0.0), 1)
        logits_NC = tl.where(is_column_C[None, :], logits_NC, float("-inf"))

        # A row that has met only -inf so far is shifted by a finite number, and -inf - m is taken as LEAST.
        new_max_N = tl.maximum(max_N, tl.max(logits_NC, 1))
        shift_N = tl.maximum(new_max_N, -3.4e38)
        D_N = tl.maximum(max_N - shift_N, -1e4)
        r_N = tl.exp(D_N)
        y_NC = tl.maximum(logits_NC - shift_N[:, None], -1e4)
        e_NC = tl.exp(y_NC)
        ye_NC = y_NC * e_NC
        b_N = r_N * (b_N + 2 * D_N * a_N + D_N * D_N * s_N) + tl.sum(y_NC * ye_NC, 1)
        a_N = r_N * (a_N + D_N * s_N) + tl.sum(ye_NC, 1)
        s_N = r_N * s_N + tl.sum(e_NC, 1)
        max_N = new_max_N

    out_N = sums_ptr + tl.program_id(1) * num_rows + row_N
    tl.store(out_N, tl.maximum(max_N, -3.4e38), mask=is_row_N)
    tl.store(out_N + plane, s_N, mask=is_row_N)
    tl.store(out_N + 2 * plane, a_N, mask=is_row_N)
    tl.store(out_N + 3 * plane, b_N, mask=is_row_N)
    tl.store(out_N + 4 * plane, target_logit_N, mask=is_row_N)
