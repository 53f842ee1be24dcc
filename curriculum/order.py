"""Orders: the whole curriculum as one array of segment ids.

    scores -> sort by a measure -> B bins of equal tokens -> schedule -> emission time of every segment -> argsort

**Emission time.** Let C_b(t) be the share of bin b that the schedule has asked for by progress t, and let q be the
mid-point of a segment in its bin's shuffled token stream. The segment is due at tau = C_b^-1(q), and the order is
argsort(tau): every segment exactly once, bins interleaved evenly, and at every tau no bin off its schedule by more
than half its longest segment. The schedule is first projected (Sinkhorn) so that each moment emits one moment's worth
of tokens and each bin is used up exactly at the end: every arm trains on the same tokens, only their order differs.

    python -m curriculum.order --scores scores/ --measure entropy --schedule "then(fold(5), random, tau=0.2)" \\
        --bins 16 --seed 0 --out orders/fold5-0.npy

writes the permutation (int32 or int64 ids in training order) and, beside it, fold5-0.json: where it came from, hashes
that tie it to its scores and shards, and its composition over progress. Where validation shards were scored too, also
fold5-0.val.npy: the bin of every validation segment, by the same edges, for the per-bin validation loss.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curriculum.measures import evaluate
from curriculum.schedules import Schedule, parse
from data.cli import InputError, command
from data.files import atomic_path, digest, read_json, write_json
from data.segments import Segments

ORDER_VERSION = 1
GRID = 2048  # cells of progress on which a schedule is evaluated
TOLERANCE = 1e-9  # Sinkhorn's goal: relative error of every moment's token mass; columns are exact
USABLE = 1e-3  # above this error after MAX_SWEEPS the schedule cannot be met and is refused
MAX_SWEEPS = 5000
CELLS = 100  # rows of the composition kept in the manifest
SUBSET, SHUFFLE, IID, PLACEBO = range(4)  # purposes of random streams: default_rng([seed, purpose, ...])


def main(
    scores: Path,
    out: Path,
    measure: str = "entropy",
    schedule: str = "random",
    bins: int = 16,
    seed: int = 0,
    tokens: int = 0,
    subset_seed: int = 0,
) -> None:
    """Sort scored segments into bins and write the order in which a schedule visits them.

    Args:
        scores: folder written by curriculum.score.
        out: the order file to write (.npy); its manifest goes beside it (.json).
        measure: a column of the score table, or an arithmetic expression over columns, e.g. "nll - entropy".
        schedule: e.g. random, increasing, warmup_then_random(0.15), "then(fold(5), random, tau=0.2)".
        bins: number of bins of equal token mass, 1 to 1024.
        seed: of the shuffles within bins (and of random emission times).
        tokens: order only an i.i.d. subset of the corpus of at most this many tokens; 0 means all of it.
        subset_seed: of that subset; the same for all arms, so that they train on the same tokens.
    """
    from curriculum.score import read_scores

    if out.suffix != ".npy":
        raise InputError(f"--out {out}: an order file ends in .npy")
    if out.exists():
        raise InputError(f"{out}: already there; remove it or choose another --out")
    if seed < 0 or subset_seed < 0 or tokens < 0:
        raise InputError(f"--seed {seed}, --subset-seed {subset_seed}, --tokens {tokens}: expected 0 or more")
    plan = parse(schedule)
    table = read_scores(scores)
    values_N = evaluate(measure, table.columns)
    chosen_M = draw_subset(table.segments.length_N, tokens, subset_seed)
    built = build_order(values_N[chosen_M], table.segments.length_N[chosen_M], plan, bins, seed)
    ids = chosen_M[built.order_N]
    manifest = dict(
        scores=dict(folder=str(scores), id=table.id, segments_sha256=table.segments.digest()),
        shards=table.shards,
        unit=table.unit,
        max_len=table.max_len,
        measure=measure,
        schedule=plan.text,
        bins=bins,
        seed=seed,
        multiset="exact",
        budget_tokens=tokens,
        subset_seed=subset_seed,
        num_segments=len(ids),
        num_tokens=int(table.segments.length_N[ids].sum(dtype=np.int64)),
        corpus_tokens=table.segments.num_tokens,
        edges=built.edges.tolist(),
        bin_tokens=built.bin_tokens_B.tolist(),
        schedule_error=built.schedule_error,
        composition=built.composition_CB.round(6).tolist(),
        rank_by_progress=built.rank_C.round(6).tolist(),
    )
    if any(scores.glob("*_val_*.parquet")):
        val = read_scores(scores, "val")
        if val.basis != table.basis:
            raise InputError(f"{scores}: its validation tables have other settings than its training tables")
        bin_V = np.searchsorted(built.edges, evaluate(measure, val.columns), side="right").astype(np.int16)
        manifest["val_segments_sha256"] = val.segments.digest()
        manifest["val_bins_sha256"] = hashlib.sha256(bin_V.data).hexdigest()
        with atomic_path(val_path(out)) as temporary, open(temporary, "wb") as file:
            np.save(file, bin_V)
        if ties := int(np.count_nonzero(np.diff(built.edges) == 0)):
            print(f"note: {ties} bins share their edge with a neighbour ({measure} has ties): by value, as validation")
            print("  segments are binned, such bins cannot be told apart")
    save_order(out, ids, manifest)
    shown = load_order(out)
    print(f"{out}: {len(ids):,} segments, {manifest['num_tokens']:,} tokens, {plan.text} over {bins} bins of {measure}")
    print(f"  order {shown.manifest['order_sha256'][:12]}  multiset {shown.manifest['multiset_sha256'][:12]}", end="")
    print(f"  recipe {shown.manifest['recipe']}  largest error of the schedule {built.schedule_error:.1e}")


def draw_subset(length_N: np.ndarray, budget_tokens: int, seed: int) -> np.ndarray:
    """Ids (sorted) of an i.i.d. subset of at most `budget_tokens`; all of them for a budget of 0.

    Raises InputError if the corpus holds fewer tokens than asked for.
    """
    if not budget_tokens:
        return np.arange(len(length_N))
    held = int(length_N.sum(dtype=np.int64))
    if budget_tokens > held:
        raise InputError(f"--tokens {budget_tokens}: the scored corpus holds only {held} tokens")
    drawn_N = np.random.default_rng([seed, SUBSET]).permutation(len(length_N))
    kept = np.searchsorted(np.cumsum(length_N[drawn_N], dtype=np.int64), budget_tokens, side="right")
    if kept == 0:
        raise InputError(f"--tokens {budget_tokens}: less than one segment")
    return np.sort(drawn_N[:kept])


@dataclass(frozen=True)
class Built:
    order_N: np.ndarray  # positions in the given arrays, in training order
    bin_N: np.ndarray  # bin of every segment (after a placebo's permutation)
    edges: np.ndarray  # (B-1,) values of the measure between bins
    bin_tokens_B: np.ndarray
    schedule_error: float  # largest relative error of a moment's token mass after projection
    composition_CB: np.ndarray  # token share of each bin in each of CELLS equal stretches of progress
    rank_C: np.ndarray  # token-weighted mean rank of the measure in each stretch


def build_order(values_N: np.ndarray, length_N: np.ndarray, schedule: Schedule, num_bins: int, seed: int) -> Built:
    """The order of N segments under a schedule. A pure function of its arguments.

    Raises InputError if there are fewer segments than bins, a bin would be empty, or the schedule cannot be met.
    """
    if not 1 <= num_bins <= 1024:
        raise InputError(f"bins = {num_bins}: expected 1 to 1024")
    if num_bins > len(values_N):
        raise InputError(f"bins = {num_bins}, but there are only {len(values_N)} segments: use fewer bins")
    by_value_N = np.argsort(values_N, kind="stable")  # ties by id
    rank_N = token_ranks(by_value_N, length_N)
    bin_N = equal_bins(rank_N, num_bins)
    edges = values_N[by_value_N[np.searchsorted(bin_N[by_value_N], np.arange(1, num_bins)).clip(max=len(bin_N) - 1)]]
    if schedule.placebo:  # bins of equal tokens again, of segments sorted by chance
        by_chance_N = np.random.default_rng([seed, PLACEBO]).permutation(len(values_N))
        bin_N = equal_bins(token_ranks(by_chance_N, length_N), num_bins)
    bin_counts_B = np.bincount(bin_N, minlength=num_bins)
    if not bin_counts_B.all():
        raise InputError(
            f"bins = {num_bins}: bin {int(np.argmin(bin_counts_B))} would hold no segment "
            "(a bin's share of tokens is smaller than one segment): use fewer bins"
        )
    bin_tokens_B = np.bincount(bin_N, weights=length_N, minlength=num_bins)
    progress_G = (np.arange(GRID) + 0.5) / GRID
    wanted_GB, error = project(schedule.weights(progress_G, num_bins), bin_tokens_B / bin_tokens_B.sum())
    tau_N = emission_times(bin_N, length_N, wanted_GB, seed)
    for index, (begin, end) in enumerate(schedule.iid_spans):
        inside_N = (tau_N >= begin) & (tau_N < end)
        stream = np.random.default_rng([seed, IID, index])
        tau_N[inside_N] = stream.uniform(begin, end, np.count_nonzero(inside_N))
    order_N = np.argsort(tau_N, kind="stable")
    composition_CB, rank_C = composition(order_N, bin_N, rank_N, length_N, num_bins)
    return Built(order_N, bin_N, edges, bin_tokens_B.astype(np.int64), error, composition_CB, rank_C)


def token_ranks(by_value_N: np.ndarray, length_N: np.ndarray) -> np.ndarray:
    """Token-mass quantile in (0, 1) of the middle of every segment, in the given sorted sequence.

    >>> token_ranks(np.array([1, 0, 2]), np.array([2, 1, 1]))
    array([0.5  , 0.125, 0.875])
    """
    sorted_length_N = length_N[by_value_N]
    end_N = np.cumsum(sorted_length_N, dtype=np.int64)
    rank_N = np.empty(len(length_N))
    rank_N[by_value_N] = (end_N - sorted_length_N / 2) / end_N[-1]
    return rank_N


def equal_bins(rank_N: np.ndarray, num_bins: int) -> np.ndarray:
    """Bins of equal token mass, int32 (N,).

    >>> equal_bins(np.array([0.5, 0.125, 0.875]), 2).tolist()
    [1, 0, 1]
    """
    return np.minimum((rank_N * num_bins).astype(np.int32), num_bins - 1)


def project(weights_GB: np.ndarray, mass_B: np.ndarray) -> tuple[np.ndarray, float]:
    """Scale rows and columns (Sinkhorn) until every row holds 1/G of the tokens and column b holds mass_B[b].

    Returns the projected (G, B) array, whose columns are exact, and the largest relative error of a row.
    Raises InputError if the schedule never visits a bin, or if no scaling of it comes near equal rows.
    """
    if unvisited := np.flatnonzero(weights_GB.sum(0) <= 0).tolist():
        raise InputError(f"the schedule never visits bin {unvisited[0]}: its segments could not be placed")
    num_cells = len(weights_GB)
    row_G = np.ones(num_cells)
    with np.errstate(all="ignore"):
        for _ in range(MAX_SWEEPS):
            column_B = mass_B / (row_G @ weights_GB)
            held_G = row_G * (weights_GB @ column_B)
            error = float(np.abs(held_G * num_cells - 1).max())
            if not error >= TOLERANCE:
                break
            row_G /= held_G * num_cells
    # The last column scaling came after the last row scaling that is kept: columns exact, rows within `error`.
    if not error <= USABLE:  # NaN: the scaling overflowed on its way to infinity
        worst = int(np.argmax(np.nan_to_num(np.abs(held_G * num_cells - 1), nan=np.inf)))
        raise InputError(
            "the schedule cannot use every segment exactly once: too few of the bins it visits around progress "
            f"{worst / num_cells:.2f} have tokens left for it; widen sigma or use fewer bins"
        )
    return (row_G if error < TOLERANCE else row_G * held_G * num_cells)[:, None] * weights_GB * column_B, error


def emission_times(bin_N: np.ndarray, length_N: np.ndarray, wanted_GB: np.ndarray, seed: int) -> np.ndarray:
    """Progress in [0, 1] at which each of N segments is due; see the module's head."""
    num_cells, num_bins = wanted_GB.shape
    grid = np.linspace(0, 1, num_cells + 1)
    asked_GB = np.vstack([np.zeros(num_bins), np.cumsum(wanted_GB, axis=0)])
    tau_N = np.empty(len(bin_N))
    by_bin_N = np.argsort(bin_N, kind="stable")
    ends_B = np.cumsum(np.bincount(bin_N, minlength=num_bins))
    for b, ids in enumerate(np.split(by_bin_N, ends_B[:-1])):
        # Each bin has its own stream, so that one bin's shuffle does not depend on the sizes of the others.
        shuffled = np.random.default_rng([seed, SHUFFLE, b]).permutation(ids)
        end = np.cumsum(length_N[shuffled], dtype=np.int64)
        middle = (end - length_N[shuffled] / 2) / end[-1]
        tau_N[shuffled] = np.interp(middle, asked_GB[:, b] / asked_GB[-1, b], grid)
    return tau_N


def composition(order_N, bin_N, rank_N, length_N, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Token share of every bin, and mean rank, in each of CELLS equal stretches of progress: (C, B) and (C,)."""
    length = length_N[order_N]
    end = np.cumsum(length, dtype=np.int64)
    cell = np.minimum(((end - length / 2) * CELLS / end[-1]).astype(np.int64), CELLS - 1)
    tokens_CB = np.bincount(cell * num_bins + bin_N[order_N], weights=length, minlength=CELLS * num_bins)
    tokens_CB = tokens_CB.reshape(CELLS, num_bins)
    held_C = np.maximum(tokens_CB.sum(1), 1)
    rank_C = np.bincount(cell, weights=length * rank_N[order_N], minlength=CELLS) / held_C
    return tokens_CB / held_C[:, None], rank_C


@dataclass(frozen=True)
class Order:
    ids_N: np.ndarray
    manifest: dict


def save_order(path: Path, ids: np.ndarray, manifest: dict) -> None:
    """Write the ids and, last, the manifest that makes them an order: a file without one is refused."""
    ids = ids.astype(np.int32 if ids.max() < 2**31 else np.int64)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, ids)
    recipe_keys = ("measure", "schedule", "bins", "multiset", "budget_tokens", "subset_seed")
    recipe = {key: manifest[key] for key in recipe_keys} | {"scores": manifest["scores"]["id"]}
    hashes = dict(
        version=ORDER_VERSION,
        order_sha256=hashlib.sha256(ids.data).hexdigest(),
        multiset_sha256=hashlib.sha256(np.sort(ids.astype(np.int64)).data).hexdigest(),
        recipe=digest(recipe),  # all but the seed: what the runs of one arm share
    )
    write_json(path.with_suffix(".json"), hashes | manifest)


def load_order(path: Path | str) -> Order:
    """An order with its manifest. Raises InputError if either is missing, truncated or edited."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such order; make one with curriculum.order")
    if not path.with_suffix(".json").is_file():
        raise InputError(f"{path}: its manifest {path.with_suffix('.json').name} is missing: make the order again")
    manifest = read_json(path.with_suffix(".json"))
    if manifest.get("version") != ORDER_VERSION:
        raise InputError(f"{path}: order format version {manifest.get('version')}, expected {ORDER_VERSION}")
    return Order(load_hashed(path, manifest.get("order_sha256")), manifest)


def load_hashed(path: Path, recorded: str | None) -> np.ndarray:
    """An array whose bytes have the SHA-256 its manifest recorded. Raises InputError on anything else."""
    try:
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise InputError(f"{path}: missing, though its order's manifest speaks of it: make the order again") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a whole .npy file: {error}") from None
    found = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
    if found != recorded:
        raise InputError(f"{path}: its content hashes to {found[:12]}, its manifest says {str(recorded)[:12]}")
    return array


def load_val_bins(path: Path | str, manifest: dict) -> np.ndarray:
    """The bin of every validation segment, for the order at `path`."""
    return load_hashed(val_path(path), manifest.get("val_bins_sha256"))


def val_path(path: Path | str) -> Path:
    """Where the bins of the validation segments lie, for an order file."""
    return Path(path).with_suffix(".val.npy")


def check_segments(order: Order, segments: Segments, path: Path | str) -> None:
    """Raises InputError unless the order's ids were made for exactly these segments."""
    found, expected = segments.digest(), order.manifest["scores"]["segments_sha256"]
    if found != expected:
        raise InputError(
            f"{path}: an order of other shards: it was made for segments {expected[:12]} "
            f"({order.manifest['corpus_tokens']} tokens, max_len {order.manifest['max_len']}), "
            f"the shards give {found[:12]} ({segments.num_tokens} tokens)"
        )


if __name__ == "__main__":
    command(main)
