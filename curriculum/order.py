"""Orders: the whole curriculum as one array of segment ids.

    scores -> sort by a measure -> bins of equal tokens -> schedule -> emission time of every segment -> sort by time

**Emission time.** Let C_b(t) be the share of bin b that the schedule has asked for by progress t, and let q be the
mid-point of a segment in its bin's shuffled token stream. The segment is due at tau = C_b^-1(q), and the order sorts
by tau: every segment exactly once, bins interleaved evenly, and at every tau no bin off its schedule by more than half
its longest segment. The schedule is first projected (Sinkhorn) so that each moment emits one moment's worth of tokens
and each bin is used up exactly at the end: every arm trains on the same tokens, only their order differs.

Two things can be asked beside that. `--epochs E` uses every segment E times: a bin's stream is then E shuffles of it,
one after another, under one schedule for the whole run. `--multiset reweight` leaves the schedule as it is over a
budget of tokens: bins that are asked for more than they hold repeat, others are left out. That is a selection of data,
not an order of it, and is labelled so.

    python -m curriculum.order --scores scores/ --measure entropy --schedule "then(fold(5), random, tau=0.2)" \\
        --bins 16 --seed 0 --out orders/fold5-0.npy

writes the order (int32 or int64 ids in training order) and, beside it, fold5-0.json: where it came from, hashes that
tie it to its scores and shards, and what it does (`curriculum.diagnostics`). Where validation shards were scored too,
also fold5-0.val.npy: the bin of every validation segment, by the same edges, for the per-bin validation loss; and with
the schedule `adaptive` fold5-0.bins.npy: the bin of every entry, for the run that draws from them.

    N segments   M entries of an order   S bins   G cells of progress   C rows of the manifest's composition

**Ten billion segments** do not fit one machine's memory; nothing here needs them to. (1) Two additive passes over the
score tables give every bin's edges (`bins.radix_edges`; 64 bins, 256 KiB of counts an edge) and its tokens. (2) The
schedule is projected: it knows masses, not segments. (3) A segment's place q in its bin's stream is drawn as a uniform
number from a hash of (seed, id) instead of a shuffle's cumulative sum, and tau follows from its value, its bin and q
alone: any worker, any piece of the table. (4) Workers append (tau, id) to the file of tau's time block, 1,024 of them,
and each block, 10^7 entries, is sorted by itself when training comes near it. Even spacing within a bin is lost in
(3), a random fluctuation of the size of a shuffle's; exactly-once is not.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from curriculum.bins import Bins, Layout, cut_bins, deal_bins, place
from curriculum.diagnostics import describe
from curriculum.measures import evaluate
from curriculum.schedules import Schedule, parse
from data.cli import InputError, command
from data.files import atomic_path, digest, read_json, write_json
from data.segments import Segments

ORDER_VERSION = 2
GRID = 2520  # cells of progress on which a schedule is evaluated: halves to tenths of a run end between two of them
TOLERANCE = 1e-9  # Sinkhorn's goal: relative error of every moment's token mass; columns are exact
USABLE = 1e-3  # above this error after MAX_SWEEPS the schedule cannot be met and is refused
MAX_SWEEPS = 5000
MOST_REPEATS = 1000  # of a segment, in a reweighted order
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
    epochs: int = 1,
    multiset: Literal["exact", "reweight"] = "exact",
    second_bins: int = 1,
    axis: int = 1,
    hold_extremes: float = 0.0,
    config: Path | None = None,
) -> None:
    """Sort scored segments into bins and write the order in which a schedule visits them.

    Args:
        scores: folder written by curriculum.score.
        out: the order file to write (.npy); its manifest goes beside it (.json).
        measure: a column of the score table, or an expression over columns, e.g. "nll - entropy"; two of them, as in
            "entropy x surprise_gap", make a grid of bins (see second-bins).
        schedule: e.g. random, increasing, warmup_then_random(0.15), "then(fold(5), random, tau=0.2)".
        bins: number of bins of equal token mass, 1 to 1024.
        seed: of the shuffles within bins (and of random emission times).
        tokens: budget. exact: order only an i.i.d. subset of the corpus, epochs included; reweight: draw so many.
            0 means all of the corpus, epochs times.
        subset_seed: of that subset; the same for all arms, so that they train on the same tokens.
        epochs: how often every segment is used, each time in a fresh shuffle of its bin.
        multiset: exact uses every segment equally often; reweight takes the schedule as it is: selection, not order.
        second_bins: bins of the second measure within every bin of the first.
        axis: the measure along which the schedule runs, 1 or 2; the other is held even at every moment.
        hold_extremes: share of tokens at either end of the measure (e.g. 0.02) that never comes first or last.
        config: a trainer's config, whose learning rates and batch size the manifest's diagnostics use.
    """
    from curriculum.config import Config, load
    from curriculum.score import read_scores

    if out.suffix != ".npy":
        raise InputError(f"--out {out}: an order file ends in .npy")
    if out.exists():
        raise InputError(f"{out}: already there; remove it or choose another --out")
    if seed < 0 or subset_seed < 0 or tokens < 0:
        raise InputError(f"--seed {seed}, --subset-seed {subset_seed}, --tokens {tokens}: expected 0 or more")
    if not 1 <= epochs <= MOST_REPEATS:
        raise InputError(f"--epochs {epochs}: expected 1 to {MOST_REPEATS}")
    if multiset == "reweight" and (epochs > 1 or subset_seed):
        raise InputError("--multiset reweight draws from the whole corpus: it takes --tokens, not --epochs or a subset")
    layout, plan = Layout(bins, second_bins, axis, hold_extremes), parse(schedule)
    run = load(config) if config else Config()
    table = read_scores(scores)
    length_N = table.segments.length_N
    values = [evaluate(part, table.columns) for part in measures_of(measure)]
    layout.check(len(values))
    if plan.adaptive:
        check_adaptive(scores, layout, multiset)
    if multiset == "exact":
        pool_P = draw_subset(length_N, tokens, subset_seed, epochs)
        if len(pool_P) < len(length_N):  # a copy of everything would cost a large corpus gigabytes
            values, length_N = [value_N[pool_P] for value_N in values], length_N[pool_P]
        built = build_order(values, length_N, plan, layout, seed, epochs=epochs)
    else:
        pool_P, budget = None, tokens or table.segments.num_tokens
        built = build_order(values, length_N, plan, layout, seed, budget_tokens=budget)
    told = describe(built, run.data.batch_tokens, run.optim.lr_scale)
    ids = built.order_M if pool_P is None or len(pool_P) == len(table.segments) else pool_P[built.order_M]
    manifest = dict(
        scores=dict(folder=str(scores), id=table.id, segments_sha256=table.segments.digest()),
        shards=table.shards,
        unit=table.unit,
        max_len=table.max_len,
        measure=measure,
        schedule=plan.text,
        bins=layout.num_bins,
        layout=layout._asdict(),
        seed=seed,
        multiset=multiset,
        epochs=epochs,
        budget_tokens=tokens,
        subset_seed=subset_seed,
        num_segments=len(ids),
        num_tokens=told.pop("num_tokens"),
        corpus_segments=len(table.segments),
        corpus_tokens=table.segments.num_tokens,
        pool_segments=len(length_N),
        edges=built.bins.edges_F.tolist(),
        second_edges=built.bins.second_edges.tolist(),
        bin_tokens=built.bins.tokens_S.tolist(),
        schedule_error=built.schedule_error,
        diagnosed_with=dict(config=str(config) if config else "defaults", batch_tokens=run.data.batch_tokens),
        **told,
    )
    if any(scores.glob("*_val_*.parquet")):
        val = read_scores(scores, "val")
        if val.basis != table.basis:
            raise InputError(f"{scores}: its validation tables have other settings than its training tables")
        values_V = [evaluate(part, val.columns, basis=table.columns) for part in measures_of(measure)]
        bin_V = place(values_V, built.bins.edges_F, built.bins.second_edges)
        manifest["val_segments_sha256"] = val.segments.digest()
        manifest["val_bins_sha256"] = hashlib.sha256(bin_V.data).hexdigest()
        with atomic_path(val_path(out)) as temporary, open(temporary, "wb") as file:
            np.save(file, bin_V)
        if ties := int(np.count_nonzero(np.diff(built.bins.edges_F) == 0)):
            print(f"note: {ties} bins share their edge with a neighbour ({measure} has ties): by value, as validation")
            print("  segments are binned, such bins cannot be told apart")
    if plan.adaptive:
        manifest["adaptive"] = plan.adaptive
        manifest["entry_bins_sha256"] = hashlib.sha256(built.bin_M.data).hexdigest()
        with atomic_path(bins_path(out)) as temporary, open(temporary, "wb") as file:
            np.save(file, built.bin_M)
    save_order(out, ids, manifest)
    shown = load_order(out).manifest
    amount = f"{len(ids):,} segments, {shown['num_tokens']:,} tokens"
    print(f"{out}: {amount}, {plan.text} over {shown['bins']} bins of {measure}")
    print(f"  order {shown['order_sha256'][:12]}  multiset {shown['multiset_sha256'][:12]}", end="")
    print(f"  recipe {shown['recipe']}  largest error of the schedule {built.schedule_error:.1e}")
    if plan.adaptive:
        print("  adaptive: a pool to draw from; the file has every bin's stream, interleaved evenly, and train_gpt.py")
        print("  draws from them as it learns; what it drew, as an order: python -m curriculum.adaptive RUN --out FILE")
    if multiset == "reweight":
        print(f"  selection, not order: {shown['coverage']:.1%} of the corpus's tokens are used, ", end="")
        print(f"{shown['omitted_segments']:,} segments never, {shown['repeated_segments']:,} more than once ", end="")
        print(f"(at most {shown['most_repeats']} times)")


def check_adaptive(scores: Path, layout: Layout, multiset: str) -> None:
    """Raises InputError on what a run cannot draw from as it goes."""
    if multiset == "reweight":
        raise InputError(
            "--multiset reweight: an adaptive run repeats nothing and stops where run.steps says; make the pool exact, "
            "with --tokens some times those of the run, and it selects"
        )
    if layout.hold_extremes or layout.axis != 1:
        raise InputError(
            f"--hold-extremes {layout.hold_extremes}, --axis {layout.axis}: not with adaptive, which weighs every bin "
            "by itself at every moment"
        )
    if not any(scores.glob("*_val_*.parquet")):
        raise InputError(f"{scores}: holds no scores of validation segments, by which adaptive measures progress")


def measures_of(text: str) -> list[str]:
    """The measures of an order: one expression, or two with a lone `x` between them.

    >>> measures_of("entropy x nll - entropy")
    ['entropy', 'nll - entropy']
    """
    return re.split(r"\s+x\s+", text.strip())


def draw_subset(length_N: np.ndarray, budget_tokens: int, seed: int, epochs: int = 1) -> np.ndarray:
    """Ids (sorted) of an i.i.d. subset that `epochs` times over holds at most `budget_tokens`; all for a budget of 0.

    Raises InputError if the corpus holds fewer tokens than asked for.
    """
    dtype = np.int32 if len(length_N) < 1 << 31 else np.int64
    if not budget_tokens:
        return np.arange(len(length_N), dtype=dtype)
    held = int(length_N.sum(dtype=np.int64))
    if budget_tokens > held * epochs:
        times = f", {epochs} epochs of it {held * epochs}: ask for fewer or" if epochs > 1 else ": ask for fewer or"
        raise InputError(f"--tokens {budget_tokens}: the scored corpus holds only {held} tokens{times} raise --epochs")
    drawn_N = np.random.default_rng([seed, SUBSET]).permutation(len(length_N)).astype(dtype)
    end_N = np.cumsum(length_N[drawn_N], dtype=np.int64)
    kept = np.searchsorted(end_N, budget_tokens // epochs, side="right")
    if kept == 0:
        raise InputError(f"--tokens {budget_tokens}: less than one segment")
    return np.sort(drawn_N[:kept])


@dataclass(frozen=True)
class Built:
    order_M: np.ndarray  # positions in the given arrays, in training order
    length_M: np.ndarray  # of the same segments
    bin_M: np.ndarray  # int16
    rank_M: np.ndarray  # float32: token-mass quantile by the (first) measure
    bins: Bins  # after a placebo's permutation
    asked_GS: np.ndarray  # tokens asked of each bin in each of GRID cells of progress
    schedule_error: float  # largest relative error of a moment's token mass after projection

    @property
    def bin_N(self) -> np.ndarray:
        """The bin of every segment, in the sequence of the given arrays."""
        return self.bins.bin_N


def build_order(
    values: np.ndarray | list[np.ndarray],
    length_N: np.ndarray,
    schedule: Schedule,
    layout: int | Layout,
    seed: int,
    *,
    epochs: int = 1,
    budget_tokens: int = 0,
) -> Built:
    """The order of N segments under a schedule. A pure function of its arguments.

    `values` (N,) are those of the measure, or a list of one or two such arrays; `layout` may be a number of bins. With
    a budget the schedule is not projected, and repeats or leaves out what it must. Raises InputError if there are fewer
    segments than bins, a bin would be empty, or the schedule cannot be met.
    """
    values = values if isinstance(values, list) else [values]
    layout = Layout(layout) if isinstance(layout, int) else layout
    layout.check(len(values))
    if schedule.stock and budget_tokens:
        raise InputError("schedule stock is the corpus as it lies: it goes with --multiset exact only")
    if layout.num_bins > len(length_N):
        raise InputError(f"bins = {layout.num_bins}, but there are only {len(length_N)} segments: use fewer bins")
    bins = cut_bins(values, length_N, layout)
    if schedule.placebo:
        bins = deal_bins(bins, layout, np.random.default_rng([seed, PLACEBO]))
    if budget_tokens:
        asked_GS, error = wished(schedule, layout) * budget_tokens, 0.0
    else:
        exact_GS, error = exact(schedule, layout)
        asked_GS = exact_GS * (bins.tokens_S * epochs / exact_GS.sum(0))
    entries = emit(bins, asked_GS, seed, whole_passes=0 if budget_tokens else epochs)
    if schedule.stock:
        as_it_lies(entries, length_N, epochs)
    shuffle_spans(entries, schedule.iid_spans, layout.held_bins, len(length_N), seed)
    at_M = by_time(entries.tau_M)
    if budget_tokens:
        at_M = at_M[: np.searchsorted(np.cumsum(entries.length_M[at_M], dtype=np.int64), budget_tokens, side="right")]
    # In time order each bin is read from front to back, so these lookups find their neighbours in the cache.
    columns = (column[at_M] for column in (entries.id_M, entries.length_M, entries.bin_M, entries.rank_M))
    return Built(*columns, bins, asked_GS, error)


def wished(schedule: Schedule, layout: Layout) -> np.ndarray:
    """The schedule as it is, as shares of a run's tokens: (G, S), summing to 1."""
    return layout.weights(schedule.weights, (np.arange(GRID) + 0.5) / GRID) / GRID


def exact(schedule: Schedule, layout: Layout) -> tuple[np.ndarray, float]:
    """The schedule as an exact order gives it, (G, S) summing to 1, and the largest relative error of a moment.

    Bins are taken to be cut to the token. They are within a segment of it, and a bin's tokens follow its column however
    many they are; so what can be met is a matter of schedule and layout, not of the corpus. Stretches of `random` are
    not projected: an honest sample does not make up for what the rest of the run asks too much or too little of a bin.

    Raises InputError if the rest never visits a bin, or if no scaling of it comes near equal moments.
    """
    share_GS, error = wished(schedule, layout), 0.0
    progress_G = (np.arange(GRID) + 0.5) / GRID
    planned_G = np.ones(GRID, bool)
    for begin, end in schedule.iid_spans:
        planned_G &= (progress_G < begin) | (progress_G >= end)
    if planned_G.any():
        left_S = layout.mass_S - share_GS[~planned_G].sum(0)
        scaled_GS, error = project(share_GS[planned_G], left_S / left_S.sum())
        share_GS[planned_G] = scaled_GS * left_S.sum()
    return share_GS, error


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
        wished_B = weights_GB.sum(0) / weights_GB.sum()
        b = int(np.argmax(np.abs(np.log(wished_B / mass_B))))
        raise InputError(
            "the schedule cannot use every segment exactly once: it visits too few bins at a time for each to be used "
            f"up when it moves on (it wishes bin {b} for {wished_B[b]:.1%} of the tokens, there are {mass_B[b]:.1%}); "
            "use a wider sigma, fewer bins, or --multiset reweight"
        )
    return (row_G if error < TOLERANCE else row_G * held_G * num_cells)[:, None] * weights_GB * column_B, error


class Entries(NamedTuple):
    """What is to be ordered: M uses of segments, bin after bin, each bin's in the sequence of its stream."""

    id_M: np.ndarray
    length_M: np.ndarray
    rank_M: np.ndarray
    bin_M: np.ndarray  # int16
    pass_M: np.ndarray  # int16: how many times the bin had been used up before
    tau_M: np.ndarray  # progress in [0, 1] at which the segment is due


def emit(bins: Bins, asked_GS: np.ndarray, seed: int, whole_passes: int = 1) -> Entries:
    """Emission times; see the module's head.

    Each bin's stream is `whole_passes` shuffles of its segments, or, for 0, as many as the tokens asked of it take.
    """
    num_cells, num_bins = asked_GS.shape
    grid = np.linspace(0, 1, num_cells + 1)
    asked_GS = np.vstack([np.zeros(num_bins), np.cumsum(asked_GS, axis=0)])
    parts = []
    for b, (begin, end) in enumerate(zip(bins.cut[:-1], bins.cut[1:], strict=True)):
        held, asked = int(bins.length_N[begin:end].sum(dtype=np.int64)), asked_GS[-1, b]
        passes = whole_passes or int(np.ceil(asked / held))
        if passes > MOST_REPEATS:
            raise InputError(
                f"the schedule asks bin {b} for {asked:.0f} tokens, it holds {held}: its segments would be repeated "
                f"{passes} times, at most {MOST_REPEATS} are allowed; lower --tokens or use fewer bins"
            )
        if passes == 0:
            continue
        # Each bin has its own stream, so that one bin's shuffle does not depend on the sizes of the others.
        rng, places = np.random.default_rng([seed, SHUFFLE, b]), np.arange(begin, end, dtype=bins.id_N.dtype)
        place = np.concatenate([rng.permutation(places) for _ in range(passes)])
        length = bins.length_N[place]
        stop = np.cumsum(length, dtype=np.int64)
        middle = stop - length / 2
        used = slice(None) if whole_passes else slice(np.searchsorted(middle, asked))
        tau = np.interp(middle[used] / (stop[-1] if whole_passes else asked), asked_GS[:, b] / asked, grid)
        # Bins of equally long segments fall due at the very same moments: chance decides who goes first, or every
        # batch would hold the same part of the bins. Too little to matter otherwise, at 4 billion segments one place.
        tau += rng.random(len(tau)) * 2.0**-32
        place = place[used]
        passed = np.repeat(np.arange(passes, dtype=np.int16), end - begin)[used]
        bin_b = np.full(len(place), b, np.int16)
        parts.append(Entries(bins.id_N[place], length[used], bins.rank_N[place], bin_b, passed, tau))
    return Entries(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def shuffle_spans(entries: Entries, spans, held_bins: tuple[int, ...], num_segments: int, seed: int) -> None:
    """Draw emission times within the spans anew, uniformly. A segment's draw is its own, whatever bin it is in.

    Held extremes stay where they are, spread over the middle of the run.
    """
    passes = int(entries.pass_M.max(initial=0)) + 1
    for index, (begin, end) in enumerate(spans):
        inside_M = (entries.tau_M >= begin) & (entries.tau_M < end)
        for b in held_bins:
            inside_M &= entries.bin_M != b
        for number in range(passes):
            drawn_N = np.random.default_rng([seed, IID, index, number]).uniform(begin, end, num_segments)
            at = np.flatnonzero(inside_M if passes == 1 else inside_M & (entries.pass_M == number))
            entries.tau_M[at] = drawn_N[entries.id_M[at]]


def as_it_lies(entries: Entries, length_N: np.ndarray, epochs: int) -> None:
    """Emission times of the corpus as it lies in its shards: a segment's own place, once in each epoch."""
    end_N = np.cumsum(length_N, dtype=np.int64)
    place_N = (end_N - length_N / 2) / end_N[-1]
    np.divide(entries.pass_M + place_N[entries.id_M], epochs, out=entries.tau_M)


def by_time(tau_M: np.ndarray) -> np.ndarray:
    """Places that sort emission times: tau as the upper bits of an integer and the place as the lower ones, for one
    sort of plain integers. 10 million entries leave tau 40 bits, 4 billion 32."""
    place_bits = max((len(tau_M) - 1).bit_length(), 1)
    steps = float(1 << (64 - place_bits))
    key_M = np.minimum(tau_M * steps, np.nextafter(steps, 0)).astype(np.uint64)
    key_M <<= np.uint64(place_bits)
    key_M |= np.arange(len(tau_M), dtype=np.uint64)
    key_M.sort()
    key_M &= np.uint64((1 << place_bits) - 1)
    return key_M.view(np.int64)


@dataclass(frozen=True)
class Order:
    ids_N: np.ndarray
    manifest: dict


def save_order(path: Path, ids: np.ndarray, manifest: dict) -> None:
    """Write the ids and, last, the manifest that makes them an order: a file without one is refused."""
    ids = ids.astype(np.int32 if ids.max() < 2**31 else np.int64)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, ids)
    recipe_keys = ("measure", "schedule", "bins", "layout", "multiset", "epochs", "budget_tokens", "subset_seed")
    recipe_keys += ("replay_of",)
    recipe = {key: manifest[key] for key in recipe_keys if key in manifest} | {"scores": manifest["scores"]["id"]}
    hashes = dict(
        version=ORDER_VERSION,
        order_sha256=hashlib.sha256(ids.data).hexdigest(),
        multiset_sha256=hashlib.sha256(np.sort(ids).astype(np.int64).data).hexdigest(),
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


def load_static_order(path: Path | str) -> Order:
    """An order to be read from front to back. Raises InputError also if it is one to be drawn from as a run goes."""
    order = load_order(path)
    if "adaptive" in order.manifest:
        raise InputError(
            f"{path}: adaptive: train_gpt.py draws from it as it goes, nothing else can; use what a run drew, "
            "python -m curriculum.adaptive RUN --out FILE"
        )
    return order


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


def bins_path(path: Path | str) -> Path:
    """Where the bins of an adaptive order's entries lie, for an order file."""
    return Path(path).with_suffix(".bins.npy")


class Sorted(NamedTuple):
    """The pool of segments an order was drawn from, as the order binned them."""

    ids_P: np.ndarray  # sorted
    values_P: np.ndarray  # of the (first) measure
    bin_P: np.ndarray


def sorted_pool(order: Order, scores) -> Sorted:
    """Bins and values behind an order, from the score tables it was made of (`curriculum.score.Scores`).

    They are cut again, as edges alone could not tell equal values on both sides of one. Raises InputError if the tables
    are others, or give other bins.
    """
    manifest = order.manifest
    if scores.id != manifest["scores"]["id"]:
        raise InputError(f"holds scores {scores.id}, the order was made from {manifest['scores']['id']}")
    whole = manifest["pool_segments"] == len(scores.segments)
    ids_P = np.arange(len(scores.segments)) if whole else np.unique(order.ids_N)
    values = [evaluate(part, scores.columns)[ids_P] for part in measures_of(manifest["measure"])]
    length_P, layout = scores.segments.length_N[ids_P], Layout(**manifest["layout"])
    bins = cut_bins(values, length_P, layout)
    if manifest["schedule"].startswith("placebo("):  # the canonical text has it outermost
        bins = deal_bins(bins, layout, np.random.default_rng([manifest["seed"], PLACEBO]))
    if bins.tokens_S.tolist() != manifest["bin_tokens"]:
        raise InputError("gives bins of other sizes than the order's: make the order again")
    return Sorted(ids_P, values[0], bins.bin_N)


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
