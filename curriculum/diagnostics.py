"""What an order does, told before a GPU is spent: composition, quotas, what the learning rate makes of it.

N segments   M entries of an order   S bins   G cells of asked tokens   C cells of the composition   T batches
"""

from collections.abc import Callable

import numpy as np

CELLS = 100  # rows of the composition kept in the manifest
LAST = 0.05  # share of a run whose mean rank is told apart: what a model saw last weighs most in its final loss
BATCHES_AT_ONCE = 4096


def describe(built, batch_tokens: int, lr_scale: Callable[[float], float]) -> dict:
    """The manifest's diagnostics of an order (`curriculum.order.Built`).

    num_tokens              of the order
    coverage                share of the pool's tokens used at least once
    omitted_segments, repeated_segments, most_repeats
    asked_tokens, given_tokens   of each bin, over the whole run
    largest_deviation_tokens     of any bin from what was asked of it, at any of the composition's cell ends
    composition             token share of each bin in each of C equal stretches of progress
    rank_by_progress        token-weighted mean rank of the measure there
    length_by_progress      mean length of a segment there: a curriculum that is only one of lengths shows here
    lr_weighted_rank        mean rank under the run's learning rate
    last_rank               mean rank of the last 5 % of the run
    batch_distance          total variation distance between the bins of adjacent batches: mean, largest (0 to 1)
    """
    order_M, length_M, bin_M, asked_GS = built.order_M, built.length_M, built.bin_M, built.asked_GS
    num_bins = asked_GS.shape[1]
    end_M = np.cumsum(length_M, dtype=np.int64)
    num_tokens, pool_tokens = int(end_M[-1]), int(built.bins.tokens_S.sum())
    tokens_CS, rank_C, length_C = composition(end_M, length_M, bin_M, built.rank_M, num_bins)
    held_C = np.maximum(tokens_CS.sum(1), 1)
    used_N = np.zeros(len(built.bins.id_N), np.int32)
    np.add.at(used_N, order_M, np.int32(1))
    lr_C = np.array([lr_scale((c + 0.5) / CELLS) for c in range(CELLS)])
    mean, largest = batch_distance(end_M, length_M, bin_M, num_bins, batch_tokens)
    return dict(
        num_tokens=num_tokens,
        coverage=float(built.bins.length_N[used_N[built.bins.id_N] > 0].sum(dtype=np.int64) / pool_tokens),
        omitted_segments=int(np.count_nonzero(used_N == 0)),
        repeated_segments=int(np.count_nonzero(used_N > 1)),
        most_repeats=int(used_N.max()),
        asked_tokens=asked_GS.sum(0).round(1).tolist(),
        given_tokens=tokens_CS.sum(0).astype(np.int64).tolist(),
        largest_deviation_tokens=round(largest_deviation(asked_GS, tokens_CS), 1),
        composition=(tokens_CS / held_C[:, None]).round(6).tolist(),
        rank_by_progress=rank_C.round(6).tolist(),
        length_by_progress=length_C.round(2).tolist(),
        lr_weighted_rank=round(float(np.average(rank_C, weights=lr_C * held_C)), 6) if lr_C.any() else None,
        last_rank=round(float(np.average(rank_C[-round(LAST * CELLS) :], weights=held_C[-round(LAST * CELLS) :])), 6),
        batch_distance=dict(mean=round(mean, 6), largest=round(largest, 6)),
    )


def composition(end_M, length_M, bin_M, rank_M, num_bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of every bin (C, S), mean rank (C,) and mean segment length (C,) in each of CELLS stretches of progress.

    A segment counts where its middle lies.
    """
    middle_M = 2 * end_M - length_M
    cell_M = np.minimum(middle_M * CELLS // (2 * end_M[-1]), CELLS - 1)
    # Cells are runs of entries, so all but the bins are sums between two places.
    cut = np.searchsorted(cell_M, np.arange(CELLS + 1))
    total = np.concatenate([[0], np.cumsum(length_M * rank_M.astype(np.float64))])
    rank_C = np.diff(total[cut])
    tokens_C = np.diff(np.concatenate([[0], end_M])[cut])
    cell_M *= num_bins
    cell_M += bin_M
    tokens_CS = np.bincount(cell_M, weights=length_M, minlength=CELLS * num_bins).reshape(CELLS, num_bins)
    return tokens_CS, rank_C / np.maximum(tokens_C, 1), tokens_C / np.maximum(np.diff(cut), 1)


def largest_deviation(asked_GS: np.ndarray, tokens_CS: np.ndarray) -> float:
    """Largest distance of a bin's tokens so far from those asked so far, at the end of every cell."""
    grid = np.linspace(0, 1, len(asked_GS) + 1)
    asked_GS = np.vstack([np.zeros(asked_GS.shape[1]), np.cumsum(asked_GS, axis=0)])
    given_CS = np.cumsum(tokens_CS, axis=0)
    progress_C = given_CS.sum(1) / given_CS[-1].sum()
    due_CS = np.stack([np.interp(progress_C, grid, asked_GS[:, b]) for b in range(asked_GS.shape[1])], axis=1)
    return float(np.abs(given_CS - due_CS).max())


def batch_distance(end_M, length_M, bin_M, num_bins: int, batch_tokens: int) -> tuple[float, float]:
    """Mean and largest total variation distance between the bins of adjacent full batches; 0, 0 for fewer than two.

    A segment counts where its middle lies, as one on the border is shared out by the loader.
    """
    batch_M = (2 * end_M - length_M) // (2 * batch_tokens)
    num_batches = int(end_M[-1] // batch_tokens)
    total, largest, before = 0.0, 0.0, None
    for first in range(0, num_batches, BATCHES_AT_ONCE):
        last = min(first + BATCHES_AT_ONCE, num_batches)
        some = slice(*np.searchsorted(batch_M, [first, last]))
        at = (batch_M[some] - first) * num_bins + bin_M[some]
        tokens_TS = np.bincount(at, weights=length_M[some], minlength=(last - first) * num_bins)
        share_TS = tokens_TS.reshape(-1, num_bins)
        share_TS = share_TS / np.maximum(share_TS.sum(1, keepdims=True), 1)
        if before is not None:
            share_TS = np.vstack([before, share_TS])
        before = share_TS[-1:]
        distance = 0.5 * np.abs(np.diff(share_TS, axis=0)).sum(1)
        total, largest = total + float(distance.sum()), max(largest, float(distance.max(initial=0)))
    return total / max(num_batches - 1, 1), largest
