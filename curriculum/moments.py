"""Entropy, varentropy and NLL of every token in one pass over the vocabulary.

    N tokens   D hidden width   V vocabulary   C columns of one chunk   K chunks

Nothing of size [N, V] is ever held. The head is applied C columns at a time, and of each chunk a row keeps four
numbers relative to the chunk's own maximum m, with y = logit - m:

    s = sum e^y        a = sum y e^y        b = sum y^2 e^y

Chunks are merged at the end. With M the row's maximum, D = m - M <= 0 and r = e^D:

    S = sum r s        A = sum r (a + D s)        B = sum r (b + 2 D a + D^2 s)

and lse = M + ln S, H = ln S - A/S, V = B/S - (A/S)^2, NLL = lse - logit_target, all in nats.

Precision: shifting by the maximum is enough in fp32 (unshifted second moments lose 21-100 % of V on peaked rows),
but logits rounded to bf16 before the reduction are not (H off by up to 0.35): the product is accumulated and kept
in fp32, whatever the type of its operands.

Four backends give the same numbers to rounding error:

    eager      BLAS products, and plain torch operations on pieces that stay in a core's cache
    compiled   the same products; torch.compile fuses the reduction: 2 passes over the logits instead of 9
    native     the same products; the reduction is moments.c, which fetches the logits once (CPU, needs a C compiler)
    triton     product and reduction in one CUDA kernel: logits never leave the chip (`curriculum.moments_triton`)
"""

import ctypes
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# 4,096 x 2,048 fp32 logits are 32 MiB: they mostly stay in a CPU's last-level cache between product and reduction, and
# both sides are wide enough for BLAS to reach 98 % of its speed on the whole matrix (2,048 rows: 97 %, 1,024: 95 %).
# A GPU hides no launches behind so small a product.
TILE = {"cpu": (4096, 2048), "cuda": (8192, 8192)}  # rows, columns
# Logits that are reduced at once: 2 MiB, and 2 MiB of e^y beside them, are two cores' L2; 32 MiB fit a GPU's.
PIECE = {"cpu": 1 << 19, "cuda": 1 << 23}
LEAST = -1e4  # exp(-1e4) is exactly 0 in fp32, and 0 * (-1e4)^2 is 0 where 0 * inf would be NaN
LOWEST = torch.finfo(torch.float32).min

# Multiplications of one call, N V D, from which compiling pays: about a second of a CPU core. A function of the call
# alone, never of what was called before: scores must not depend on where a killed scorer was started again.
COMPILE_FROM = 1 << 36

BACKENDS = ("auto", "eager", "compiled", "native", "triton")
LANES = 32  # of moments.c, which takes whole ones
_cannot_compile: set[str] = set()  # device types on which it was tried and failed


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


@torch.inference_mode()
def token_moments(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    vocab_size: int | None = None,
    cap: float = 0.0,
    cap_kind: str = "rsqrt",
    backend: str = "auto",
    rows: int | None = None,
    columns: int | None = None,
) -> Moments:
    """Moments of softmax(cap(hidden @ head.T + bias)) for every row.

    hidden (N, D) and head (V, D) may be fp32 or bf16; target (N,) int64 in 0..vocab_size-1. Columns at and beyond
    `vocab_size` (padding of the head) take no part. A logit of -inf is a probability of exactly 0.
    `rows` x `columns` logits are held at once (None: what suits the device); extra memory is about 4 bytes each,
    whatever N and V. The triton backend holds none and ignores both.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    vocab_size = vocab_size or head_VD.shape[0]
    head_VD, bias_V = head_VD[:vocab_size], None if bias_V is None else bias_V[:vocab_size].float()
    if backend == "auto":
        backend = auto_backend(hidden_ND, head_VD)
    if backend == "triton":
        from curriculum.moments_triton import chunk_sums

        sums_5KN = chunk_sums(hidden_ND, head_VD, target_N, bias_V, cap, cap_kind)
        return _merge(*sums_5KN[:4], target_logit_N=sums_5KN[4].sum(0))
    likely_rows, likely_columns = TILE["cuda" if hidden_ND.is_cuda else "cpu"]
    tile = (rows or likely_rows, min(columns or likely_columns, vocab_size))
    reduce = {"eager": _Eager, "compiled": _Compiled, "native": _Native}[backend](cap, cap_kind)
    num_rows, columns = min(tile[0], len(hidden_ND)), tile[1]
    piece = num_rows if reduce.whole else min(max(PIECE["cuda" if hidden_ND.is_cuda else "cpu"] // columns, 1), tile[0])
    # Allocated once for all row blocks: fresh memory costs a CPU 1 % of the time in page faults.
    buffer_NC = hidden_ND.new_zeros(_up(num_rows, piece), _up(columns, LANES), dtype=torch.float32)[:, :columns]
    scratch_PC = None if reduce.whole else buffer_NC.new_empty(piece, columns)
    parts = [
        _row_block(hidden, head_VD, target, bias_V, buffer_NC, scratch_PC, reduce)
        for hidden, target in zip(hidden_ND.split(num_rows), target_N.split(num_rows), strict=True)
    ]
    return Moments(*(torch.cat(column) for column in zip(*parts, strict=True)))


def auto_backend(hidden_ND: Tensor, head_VD: Tensor) -> str:
    """Native on a CPU that has a C compiler, compiled on CUDA where there is enough to do, else eager.

    Of the bare product on two AVX-512 cores (V = 50,304, D = 768) native reaches 0.91-0.94, eager 0.7, compiled 0.75
    (LOG.md, 2026-11-21). Triton waits for a GPU to show that it is faster than compiled.
    """
    backend = device_backend(hidden_ND.device.type)
    return "eager" if backend == "compiled" and hidden_ND.shape[0] * head_VD.numel() < COMPILE_FROM else backend


def device_backend(device_type: str) -> str:
    """What "auto" means for large jobs on a type of device; part of the provenance of a score table."""
    if device_type == "cpu":
        return "native" if _library() else "eager"
    return "compiled" if device_type not in _cannot_compile else "eager"


def _up(size: int, step: int) -> int:
    """The least multiple of `step` that holds `size`."""
    return -(-size // step) * step


def _row_block(hidden_ND, head_VD, target_N, bias_V, buffer_NC, scratch_PC, reduce) -> Moments:
    """Moments of at most as many rows as the buffer has."""
    num_rows, (vocab_size, columns) = len(hidden_ND), (len(head_VD), buffer_NC.shape[1])
    piece = num_rows if reduce.whole else len(scratch_PC)
    buffer_NC = buffer_NC[: _up(num_rows, piece)]  # whole pieces; what the padding's rows give is dropped
    lows = range(0, vocab_size, columns)
    sums_4KN = buffer_NC.new_empty(4, len(lows), len(buffer_NC))
    target_logit_N = buffer_NC.new_zeros(num_rows)
    for k, low in enumerate(lows):
        width = min(columns, vocab_size - low)
        logits_NC = _product(hidden_ND, head_VD[low : low + width], buffer_NC)
        column_N = target_N - low
        picked_N = logits_NC[:num_rows].gather(1, column_N.clamp(0, width - 1)[:, None])[:, 0]
        target_logit_N = torch.where((column_N >= 0) & (column_N < width), picked_N, target_logit_N)
        bias_C = None if bias_V is None else bias_V[low : low + width]
        for at in range(0, len(buffer_NC), piece):
            reduce(logits_NC[at : at + piece, :width], bias_C, scratch_PC, sums_4KN[:, k, at : at + piece])
    if bias_V is not None:
        target_logit_N += bias_V[target_N]
    target_logit_N = CAPS[reduce.cap_kind](target_logit_N, reduce.cap)
    return _merge(*sums_4KN[..., :num_rows], target_logit_N=target_logit_N)


def _product(hidden_ND: Tensor, head_CD: Tensor, buffer_NC: Tensor) -> Tensor:
    """hidden @ head.T in fp32, also for bf16 operands: a bf16 result would cost up to 0.35 nats of entropy.

    It lies in the upper left of a tensor of the buffer's shape; the rest of that is finite and of no meaning.
    """
    out_NC = buffer_NC[: len(hidden_ND), : len(head_CD)]
    if hidden_ND.is_cuda and hidden_ND.dtype == head_CD.dtype == torch.bfloat16:
        product_NC = torch.mm(hidden_ND, head_CD.T, out_dtype=torch.float32)
        if product_NC.shape == buffer_NC.shape:
            return product_NC
        out_NC.copy_(product_NC)
    else:  # no CPU kernel takes bf16 in and gives fp32 out
        torch.mm(hidden_ND.float(), head_CD.float().T, out=out_NC)
    return buffer_NC


def _merge(max_KN, s_KN, a_KN, b_KN, *, target_logit_N: Tensor) -> Moments:
    """Moments of whole rows from the sums of their K chunks."""
    max_N = max_KN.amax(0)
    D_KN = (max_KN - max_N).clamp_(min=LEAST)
    r_KN = D_KN.exp()
    s_N = (r_KN * s_KN).sum(0)
    mean_N = (r_KN * (a_KN + D_KN * s_KN)).sum(0) / s_N
    square_N = (r_KN * (b_KN + 2 * D_KN * a_KN + D_KN**2 * s_KN)).sum(0) / s_N
    log_s_N = s_N.log()
    return Moments(
        nll_N=log_s_N + (max_N - target_logit_N),
        entropy_N=(log_s_N - mean_N).clamp_(min=0),
        varentropy_N=(square_N - mean_N**2).clamp_(min=0),
    )


class _Eager:
    """Reduces a piece of logits in place: each operation finds its operand in the cache."""

    whole = False  # takes all rows of a tile at once, and no scratch

    def __init__(self, cap: float, cap_kind: str):
        self.cap, self.cap_kind = cap, cap_kind

    def __call__(self, y_PC: Tensor, bias_C: Tensor | None, scratch_PC: Tensor, out_4P: Tensor) -> None:
        """Write (max, s, a, b) of every row; the logits are overwritten."""
        max_P, s_P, a_P, b_P = out_4P
        if bias_C is not None:
            y_PC += bias_C
        if self.cap:
            y_PC = CAPS[self.cap_kind](y_PC, self.cap)
        torch.amax(y_PC, 1, out=max_P)
        if bias_C is None:
            y_PC -= max_P[:, None]
        else:  # -inf enters as a bias; a chunk may hold nothing else
            y_PC.sub_(max_P.clamp_(min=LOWEST)[:, None]).clamp_(min=LEAST)
        e_PC = torch.exp(y_PC, out=scratch_PC[:, : y_PC.shape[1]])
        torch.sum(e_PC, 1, out=s_P)
        torch.sum(e_PC.mul_(y_PC), 1, out=a_P)
        torch.sum(e_PC.mul_(y_PC), 1, out=b_P)


class _Native(_Eager):
    """Reduces a tile by moments.c; a bias and Gemma's softcap come before it as torch's operations."""

    whole = True

    def __call__(self, y_PC: Tensor, bias_C: Tensor | None, scratch_PC: None, out_4P: Tensor) -> None:
        if bias_C is not None:
            y_PC += bias_C
        cap = self.cap
        if cap and self.cap_kind == "tanh":
            y_PC.copy_(tanh_capped(y_PC, cap))
            cap = 0.0
        (num_rows, columns), stride = y_PC.shape, y_PC.stride(0)
        assert stride >= _up(columns, LANES) and y_PC.stride(1) == out_4P.stride(1) == 1
        _library().reduce_rows(y_PC.data_ptr(), num_rows, columns, stride, cap, out_4P.data_ptr(), out_4P.stride(0))


@cache
def _library():
    """moments.c compiled for this very processor (0.3 s, once a process), or None where it cannot be."""
    # The parts of -ffast-math that are wanted. All of it would also link code that flushes subnormal numbers to zero,
    # in this whole process, from the moment the library is loaded.
    flags = "-O3 -march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros -ffinite-math-only".split()
    flags += ["-shared", "-fPIC"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")  # gcc would settle for half of AVX-512's width: 1.6 times slower
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "moments.so"
        # OpenMP's threads are torch's own: the library is already loaded, and -fopenmp finds it by name.
        for extra in (["-fopenmp"], []):
            command = ["cc", *flags, *extra, "-o", built, Path(__file__).with_suffix(".c")]
            try:
                subprocess.run(command, check=True, capture_output=True)
                library = ctypes.CDLL(str(built))
            except (OSError, subprocess.CalledProcessError):
                continue
            pointer, size = ctypes.c_void_p, ctypes.c_int64
            library.reduce_rows.argtypes = [pointer, size, size, size, ctypes.c_float, pointer, size]
            library.reduce_rows.restype = None
            return library
    print("note: no C compiler (cc) builds curriculum/moments.c here: scoring's head is a fifth slower on this CPU")
    return None


class _Compiled(_Eager):
    """Reduces a piece by two fused kernels of one static shape; the last, narrower chunk of columns is left to eager.

    Two, as one kernel would find maximum and sums of a row in one loop that inductor vectorises badly (half as fast).
    """

    def __call__(self, logits_PC: Tensor, bias_C: Tensor | None, scratch_PC: Tensor, out_4P: Tensor) -> None:
        kind = logits_PC.device.type
        if kind in _cannot_compile or logits_PC.shape != scratch_PC.shape:
            return super().__call__(logits_PC, bias_C, scratch_PC, out_4P)
        fused_max, fused_sums = _compiled()
        try:
            max_P = fused_max(logits_PC, bias_C, self.cap, self.cap_kind)
            found = max_P, *fused_sums(logits_PC, max_P, bias_C, self.cap, self.cap_kind)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, ImportError) as error:  # no compiler, a broken one, an unwritable cache
            _cannot_compile.add(kind)
            reason = (str(error).strip().splitlines() or [""])[0]
            print(f"note: torch.compile failed, scoring goes on without it ({type(error).__name__}: {reason})")
            return super().__call__(logits_PC, bias_C, scratch_PC, out_4P)
        for out_P, found_P in zip(out_4P, found, strict=True):
            out_P.copy_(found_P)


@cache
def _compiled():
    """`_fused_max` and `_fused_sums` compiled; torch keeps one kernel for each shape and setting."""
    return [torch.compile(function, fullgraph=True, dynamic=False) for function in (_fused_max, _fused_sums)]


def _fused_max(logits_PC, bias_C, cap: float, cap_kind: str) -> Tensor:
    logits_PC = logits_PC if bias_C is None else logits_PC + bias_C
    return CAPS[cap_kind](logits_PC, cap).amax(1).clamp(min=LOWEST)


def _fused_sums(logits_PC, max_P, bias_C, cap: float, cap_kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """s, a and b of every row."""
    logits_PC = logits_PC if bias_C is None else logits_PC + bias_C
    y_PC = (CAPS[cap_kind](logits_PC, cap) - max_P[:, None]).clamp(min=LEAST)
    e_PC = y_PC.exp()
    ye_PC = y_PC * e_PC
    return e_PC.sum(1), ye_PC.sum(1), (y_PC * ye_PC).sum(1)
