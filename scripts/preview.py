"""Look at an order before a GPU is spent on it: a picture of its bins over progress, and its numbers.

python -m scripts.preview orders/fold5-0.npy
"""

from pathlib import Path

import numpy as np

from curriculum.config import Optim
from curriculum.order import load_order
from data.cli import InputError, command

SHADES = " ░▒▓█"
ROWS, COLUMNS = 16, 72


def main(order: Path, /, cooldown_frac: float = 0.7, floor: float = 0.0) -> None:
    """Draw the bin composition of an order over progress in the terminal and print its diagnostics.

    Args:
        order: order file (.npy) with its manifest beside it.
        cooldown_frac: of the run's learning rate, for the LR-weighted mean rank: share of tokens in which it falls.
        floor: learning rate at the end, over the peak.
    """
    if not 0 <= cooldown_frac <= 1 or not 0 <= floor <= 1:
        raise InputError(f"--cooldown-frac {cooldown_frac}, --floor {floor}: expected numbers from 0 to 1")
    about = load_order(order).manifest
    composition_CB, rank_C = np.array(about["composition"]), np.array(about["rank_by_progress"])
    print(f"{order}: {about['schedule']} over {about['bins']} bins of {about['measure']}, seed {about['seed']}\n")
    print(draw(composition_CB))
    scale_C = lr_weights(Optim(cooldown_frac=cooldown_frac, floor=floor), len(rank_C))
    last = rank_C[-max(1, len(rank_C) // 20) :]
    used, held = about["num_tokens"], about["corpus_tokens"]
    rows = {
        "segments": f"{about['num_segments']:,}",
        "tokens": f"{used:,} of {held:,} scored: coverage {used / held:.1%}, each once",
        "tokens a bin": f"{min(about['bin_tokens']):,} to {max(about['bin_tokens']):,}",
        "mean rank": f"{rank_C.mean():.3f}, LR-weighted {np.average(rank_C, weights=scale_C):.3f}, "
        f"last 5 % {last.mean():.3f} (0 lowest {about['measure']}, 1 highest)",
        "schedule error": f"{about['schedule_error']:.1e} of a moment's tokens, at most",
        "order": about["order_sha256"][:16],
        "multiset": f"{about['multiset_sha256'][:16]} (equal for orders of the same tokens)",
    }
    print("\n".join(f"  {name:15}{value}" for name, value in rows.items()))


def lr_weights(optim: Optim, num_cells: int) -> np.ndarray:
    """Learning rate over its peak in the middle of each of `num_cells` stretches of progress."""
    return np.array([optim.lr_scale((i + 0.5) / num_cells) for i in range(num_cells)])


def draw(composition_CB: np.ndarray) -> str:
    """Shares of the bins over progress as text: highest bin on top, darker where more of the tokens come from it."""
    num_cells, num_bins = composition_CB.shape
    rows = min(ROWS, num_bins)
    # Average cells and bins into the picture's columns and rows; sums over bins, so that a row is a share.
    column = np.minimum(np.arange(num_cells) * COLUMNS // num_cells, COLUMNS - 1)
    picture = np.zeros((COLUMNS, rows))
    np.add.at(picture, column, np.add.reduceat(composition_CB, np.arange(rows) * num_bins // rows, axis=1))
    picture /= np.maximum(np.bincount(column, minlength=COLUMNS), 1)[:, None]
    level = np.minimum((picture * rows / 2 * len(SHADES)).astype(int), len(SHADES) - 1)  # 2x the even share is black
    lines = ["  " + "".join(SHADES[i] for i in level[:, row]) for row in reversed(range(rows))]
    return "\n".join(lines) + f"\n  {'0':<{COLUMNS - 8}}progress\n"


if __name__ == "__main__":
    command(main)
