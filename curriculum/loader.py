"""From an order to batches: packed documents by token position. The whole state is one integer.

The order lays segments end to end into one stream of tokens. Step k reads the next `batch_tokens` of it, cut into
micro-batches, so 1, 2, 4 or 8 processes see identical ones and share them out. A segment that straddles a
micro-batch's end is cut there, and its rest begins the next one as a document of its own; every token is used exactly
once. The last batch holds what is left, split evenly. Sizes of batches, numbers of micro-batches and the longest
document may change from step to step: they cut the stream elsewhere, and leave its order alone.

    stream = open_stream("data/stdlib", "orders/fold5-0.npy")
    for batch in prefetched(batches(stream, 262_144, 8, steps=100)):
        for part in batch.parts:
            part.input_T, part.target_T, part.bounds

Other trainers take the same stream as a torch dataset, `OrderDataset`; see `Rows` and examples/.

Shapes: T tokens of one flat row   N segments, or pieces of them   S steps   C cuts between micro-batches
"""

import hashlib
import mmap
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cli import InputError
from data.segments import Segments, corpus_segments
from data.shards import HEADER_BYTES, Corpus, open_corpus, read_shard

UNCUT = 2**62  # no document is longer
IGNORED = -100  # the target that torch's and Hugging Face's cross-entropy leave out
SAMPLED_PAGES = 16  # of a batch: if these are in memory, its pages are not asked for
STATE_VERSION = 1


class Packed(NamedTuple):
    """One flat row of T tokens holding whole or cut segments."""

    input_T: np.ndarray  # uint16
    target_T: np.ndarray  # uint16, the true next token of each input
    bounds: np.ndarray  # int32, (num_documents + 1,): document d is input_T[bounds[d]:bounds[d + 1]]


@dataclass
class Counters:
    """What one process has had from the loader. A segment is counted with its first token, so none counts twice."""

    tokens: int = 0  # in the loss
    segments: int = 0
    cut_segments: int = 0  # of these, not whole in one document: cut by a micro-batch's end or by the longest document
    bytes_read: int = 0  # of the shards
    wait_seconds: float = 0.0  # that the taker stood still

    def add(self, other: "Counters") -> None:
        self.tokens += other.tokens
        self.segments += other.segments
        self.cut_segments += other.cut_segments
        self.bytes_read += other.bytes_read
        self.wait_seconds += other.wait_seconds


class Batch(NamedTuple):
    step: int
    num_tokens: int  # in the whole batch, over all processes
    parts: list[Packed]  # this process's micro-batches
    counts: Counters  # of these parts


# ----------------------------------------------------------------------------------------------------------------------
# The stream


class Places(NamedTuple):
    """Where consecutive rows of a stream lie: slices of shards, which slices are whose, and where documents end."""

    shard: list[int]
    start: list[int]
    stop: list[int]  # of the inputs; targets lie one token further
    slices: list[int]  # row r has slices[r]:slices[r + 1]
    bounds: list[np.ndarray]  # of every row
    counts: Counters  # of all rows


class Stream:
    """Random access to the tokens of segments laid end to end in a given order."""

    def __init__(self, corpus: Corpus, segments: Segments, ids: np.ndarray):
        self.corpus, self.segments = corpus, segments
        self.ids = np.asarray(ids)  # a plain array: every slice of a np.memmap costs microseconds
        self.end = np.cumsum(segments.length_N[self.ids], dtype=np.int64)
        self.num_tokens = int(self.end[-1]) if len(self.ids) else 0
        opened = [read_shard(path) for path in corpus.paths]
        self._maps = [shard.base for shard in opened]  # the whole files, header first
        # Joining slices of memoryviews is what makes the loader fast: the same slices of arrays take twice as long to
        # concatenate, slices of np.memmap six times (LOG.md, 2026-11-21).
        self._views = [memoryview(np.asarray(shard)) for shard in opened]

    def __reduce__(self):
        """Goes to another process as what it was opened from: neither maps nor gigabytes of tokens travel."""
        return Stream, (self.corpus, self.segments, self.ids)

    @cached_property
    def order_sha256(self) -> str:
        """Of the ids as an order file holds them: the `order_sha256` of its manifest."""
        fits = not len(self.ids) or self.ids.max() < 2**31
        return hashlib.sha256(np.ascontiguousarray(self.ids, np.int32 if fits else np.int64).data).hexdigest()

    def read(self, begin: int, end: int, max_len: int = UNCUT) -> Packed:
        """Tokens begin..end of the stream, 0 <= begin < end <= num_tokens, in documents of at most `max_len`."""
        assert begin < end
        return self.gather(self.places([begin, end], max_len))[0]

    def places(self, cuts: Sequence[int], max_len: int = UNCUT) -> Places:
        """Rows cuts[0]..cuts[1], cuts[1]..cuts[2] and so on of the stream, empty ones left out."""
        cuts = distinct(np.asarray(cuts))
        if len(cuts) < 2:
            return Places([], [], [], [0], [], Counters())
        begin, end = int(cuts[0]), int(cuts[-1])
        assert 0 <= begin and end <= self.num_tokens and max_len >= 1
        first, last = np.searchsorted(self.end, [begin, end - 1], side="right").tolist()
        ids, end_N = self.ids[first : last + 1], self.end[first : last + 1]
        begin_N = end_N - self.segments.length_N[ids]
        edges = distinct(np.concatenate([end_N[:-1], cuts]))
        at, length = edges[:-1], np.diff(edges)  # of every slice
        of = np.searchsorted(end_N, at, side="right")  # the segment it belongs to
        start = self.segments.start_N[ids][of] + (at - begin_N[of])
        slices = np.searchsorted(edges, cuts).tolist()
        pieces = -(-length // max_len)
        begins = at == begin_N[of]
        counts = Counters(
            tokens=end - begin,
            segments=int(np.count_nonzero(begins)),
            cut_segments=int(np.count_nonzero(begins & ((pieces > 1) | (edges[1:] < end_N[of])))),
            bytes_read=2 * (end - begin + len(at)),
        )
        if pieces.max() > 1:
            edges = begin + np.concatenate([[0], np.cumsum(piece_lengths(length, pieces, max_len))])
        documents = pairwise(np.searchsorted(edges, cuts).tolist())
        bounds = [(edges[a : b + 1] - edges[a]).astype(np.int32) for a, b in documents]
        shard = self.segments.shard_N[ids][of]
        return Places(shard.tolist(), start.tolist(), (start + length).tolist(), slices, bounds, counts)

    def gather(self, places: Places) -> list[Packed]:
        """The tokens at `places`, in new and writable arrays."""
        views, rows = self._views, []
        for (a, b), bounds in zip(pairwise(places.slices), places.bounds, strict=True):
            shard, start, stop = places.shard[a:b], places.start[a:b], places.stop[a:b]
            inputs = bytearray().join([views[s][x:y] for s, x, y in zip(shard, start, stop, strict=True)])
            targets = bytearray().join([views[s][x + 1 : y + 1] for s, x, y in zip(shard, start, stop, strict=True)])
            rows.append(Packed(np.frombuffer(inputs, "<u2"), np.frombuffer(targets, "<u2"), bounds))
        return rows

    def touch(self, places: Places) -> None:
        """Ask the kernel to read the pages at `places`, without waiting for them, unless they seem to be in memory.

        From a cold page cache the first batch then comes 50 times sooner, and a quarter of the bytes is read: left to
        itself the kernel reads 128 KiB around every page that is missed. From a warm one it would double the loader's
        time, so a sample of the pages is looked at first (LOG.md, 2026-11-21).
        """
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        sample = range(0, len(places.start), max(1, len(places.start) // SAMPLED_PAGES))
        if all(is_cached(self.corpus.paths[places.shard[i]], HEADER_BYTES + 2 * places.start[i]) for i in sample):
            return
        for shard, start, stop in zip(places.shard, places.start, places.stop, strict=True):
            at = HEADER_BYTES + 2 * start
            page = at - at % mmap.PAGESIZE
            self._maps[shard].madvise(mmap.MADV_WILLNEED, page, HEADER_BYTES + 2 * stop + 2 - page)


def is_cached(path: Path, offset: int) -> bool:
    """Whether a byte of a file is in the page cache. Where that cannot be asked (not Linux), it is not."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            return os.preadv(handle, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        finally:
            os.close(handle)
    except OSError:  # it would have to wait, or this file system cannot tell
        return False


def distinct(values: np.ndarray) -> np.ndarray:
    """Sorted, each once. np.unique does the same by hashing, and takes several times as long for a few hundred."""
    values = np.sort(values)
    return values[np.diff(values, prepend=values[0] - 1) > 0]


def piece_lengths(length: np.ndarray, pieces: np.ndarray, max_len: int) -> np.ndarray:
    """Lengths of documents after each is cut into its number of pieces of `max_len`, the last one shorter.

    >>> piece_lengths(np.array([5, 2]), np.array([3, 1]), 2).tolist()
    [2, 2, 1, 2]
    """
    cut = np.full(int(pieces.sum()), max_len)
    cut[np.cumsum(pieces) - 1] = length - (pieces - 1) * max_len
    return cut


def open_stream(shards: Path | str, order: Path | str = "", max_len: int = 1024, unit: str = "document") -> Stream:
    """The stream of an order file over its shards; without one the stock order, segments as they lie in the shards.

    An order brings its own `max_len` and `unit`. Raises InputError if it was made for other shards.
    """
    from curriculum.order import check_segments, load_static_order

    corpus = open_corpus(shards, quiet=True)
    if not order:
        segments = corpus_segments(corpus, max_len, unit)
        return Stream(corpus, segments, np.arange(len(segments)))
    loaded = load_static_order(order)
    segments = corpus_segments(corpus, loaded.manifest["max_len"], loaded.manifest["unit"])
    check_segments(loaded, segments, order)
    return Stream(corpus, segments, loaded.ids_N)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


class Plan(NamedTuple):
    """Where every step of a run begins in the stream, and how it is cut."""

    begin_S: np.ndarray  # int64, (S + 1,): step s is begin_S[s]..begin_S[s + 1]
    parts_S: np.ndarray  # (S,) micro-batches, over all processes
    max_len_S: np.ndarray  # (S,) longest document

    def cuts(self, step: int) -> list[int]:
        """Ends of the micro-batches of a step: num_parts + 1 positions."""
        begin, end, parts = int(self.begin_S[step]), int(self.begin_S[step + 1]), int(self.parts_S[step])
        return [begin + (end - begin) * i // parts for i in range(parts + 1)]


def plan(
    num_tokens: int,
    batch_tokens: int | Sequence[int],
    num_parts: int | Sequence[int],
    steps: int,
    max_len: int | Sequence[int] = UNCUT,
) -> Plan:
    """The plan of a run over a stream of `num_tokens`: what is given as one number holds for every step.

    >>> plan(100, [30, 30, 60], 2, 3).begin_S.tolist()
    [0, 30, 60, 100]
    """
    batch_S = np.broadcast_to(np.asarray(batch_tokens, np.int64), steps)
    parts_S, max_len_S = (np.broadcast_to(np.asarray(x, np.int64), steps) for x in (num_parts, max_len))
    assert all((x >= 1).all() for x in (batch_S, parts_S, max_len_S))
    begin_S = np.concatenate([[0], np.cumsum(batch_S)])
    assert steps == 0 or begin_S[-2] < num_tokens, "steps beyond the end of the order"
    return Plan(np.minimum(begin_S, num_tokens), parts_S, max_len_S)


def batches(
    stream: Stream,
    batch_tokens: int | Sequence[int],
    num_parts: int | Sequence[int],
    *,
    first_step: int = 0,
    steps: int,
    rank: int = 0,
    world: int = 1,
    max_len: int | Sequence[int] = UNCUT,
) -> Iterator[Batch]:
    """Batches first_step .. steps-1 as process `rank` of `world` sees them; `num_parts` is a multiple of `world`.

    `batch_tokens`, `num_parts` and `max_len` (longest document) are one number, or one for each of the run's steps.
    """
    whole = plan(stream.num_tokens, batch_tokens, num_parts, steps, max_len)
    yield from planned(stream, whole, range(first_step, steps), rank, world)


def planned(stream: Stream, whole: Plan, steps: range, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """The batches of these steps of a plan; while one is put together, the pages of the next are on their way."""
    assert not np.any(whole.parts_S % world)

    def ask(step: int) -> Places:
        cuts, share = whole.cuts(step), int(whole.parts_S[step]) // world
        # A last batch of fewer tokens than micro-batches leaves some empty.
        places = stream.places(cuts[rank * share : (rank + 1) * share + 1], int(whole.max_len_S[step]))
        stream.touch(places)
        return places

    ahead = ask(steps[0]) if steps else None
    for i, step in enumerate(steps):
        places, ahead = ahead, ask(steps[i + 1]) if i + 1 < len(steps) else None
        num_tokens = int(whole.begin_S[step + 1] - whole.begin_S[step])
        yield Batch(step, num_tokens, stream.gather(places), places.counts)


def most_documents(
    stream: Stream,
    batch_tokens: int | Sequence[int],
    num_parts: int | Sequence[int],
    *,
    steps: int,
    max_len: int | Sequence[int] = UNCUT,
) -> int:
    """The largest number of documents in any micro-batch of the run, exactly, without reading a token.

    Room for this many (plus one bound) never overflows, however short documents cluster in the order.
    """
    return int(documents_of_parts(stream, plan(stream.num_tokens, batch_tokens, num_parts, steps, max_len)).max())


def documents_of_parts(stream: Stream, whole: Plan) -> np.ndarray:
    """How many documents each micro-batch of a run will hold, in their sequence, without reading a token."""
    counts = []
    # Stretches of steps with one longest document: each needs only its own segments, so all together cost one pass.
    edges = np.flatnonzero(np.diff(whole.max_len_S, prepend=-1, append=-1))
    for first_step, last_step in zip(edges[:-1], edges[1:], strict=True):
        at = np.arange(first_step, last_step)
        parts = whole.parts_S[at]
        begin, size = np.repeat(whole.begin_S[at], parts), np.repeat(np.diff(whole.begin_S)[at], parts)
        i, parts = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts), np.repeat(parts, parts)
        a_C, b_C = begin + size * i // parts, begin + size * (i + 1) // parts
        a_C, b_C = a_C[b_C > a_C], b_C[b_C > a_C]
        first_C, last_C = (np.searchsorted(stream.end, x, side="right") for x in (a_C, b_C - 1))
        cap, low = int(whole.max_len_S[first_step]), int(first_C[0])
        end_N = stream.end[low : int(last_C[-1]) + 1]
        pieces_N = -(-np.diff(end_N, prepend=0) // cap)  # of segment `low` it is wrong, and cancels below
        upto_N = np.cumsum(pieces_N)
        first_C, last_C = first_C - low, last_C - low
        head_C = -(-(np.minimum(end_N[first_C], b_C) - a_C) // cap)
        tail_C = -(-(b_C - end_N[last_C - 1]) // cap)
        rest_C = upto_N[last_C - 1] - upto_N[first_C] + tail_C
        counts.append(head_C + np.where(last_C > first_C, rest_C, 0))
    return np.concatenate(counts)


def prefetched(items: Iterator, depth: int = 2, counters: Counters | None = None) -> Iterator:
    """The same items, made ahead in a thread; an exception there is raised here.

    `counters` takes what the batches handed out count, and the time this waited for them.
    """
    ready: queue.Queue = queue.Queue(depth)
    done = threading.Event()

    def put(item, error=None) -> bool:
        """Wait for room; False once nobody takes items any more, so that the thread can end."""
        while not done.is_set():
            try:
                ready.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for item in items:
                if not put(item):
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            asked = time.perf_counter()
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            if counters is not None:
                counters.wait_seconds += time.perf_counter() - asked
                counters.add(item.counts)
            yield item
    finally:
        done.set()


def pinned(batch: Batch, device) -> Batch:
    """The batch with torch tensors for arrays; for a CUDA `device` in page-locked memory, so that copying them there
    with `non_blocking=True` waits for nothing. Tokens stay uint16: a quarter of the bytes, to be widened over there.

        prefetched(pinned(batch, device) for batch in batches(...))
    """
    import torch

    parts = [Packed(*map(torch.from_numpy, part)) for part in batch.parts]
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):  # a new thread's device is GPU 0, and would wake it up
            parts = [Packed(*(x.pin_memory() for x in part)) for part in parts]
    return batch._replace(parts=parts)


# ----------------------------------------------------------------------------------------------------------------------
# For other trainers


def as_packed(part: Packed, row_tokens: int) -> dict[str, np.ndarray]:
    """One flat row and its documents, of the row's own length."""
    return dict(input_ids=part.input_T.astype(np.int64), targets=part.target_T.astype(np.int64), bounds=part.bounds)


def as_row(part: Packed, row_tokens: int) -> dict[str, np.ndarray]:
    """A fixed row: inputs and targets (row_tokens,). Only an order's last rows are filled up, with ignored targets."""
    input_ids, targets = np.zeros(row_tokens, np.int64), np.full(row_tokens, IGNORED)
    input_ids[: len(part.input_T)], targets[: len(part.target_T)] = part.input_T, part.target_T
    return dict(input_ids=input_ids, targets=targets)


def as_hf(part: Packed, row_tokens: int) -> dict[str, np.ndarray]:
    """A fixed row for a Hugging Face causal LM: (row_tokens + 1,) ids, labels and positions within documents.

    Such a model compares position i with labels[i + 1]. So labels lie one further than targets, and there is one
    position more, whose prediction is not used: every prediction of the stream is made once, none across a joint.
    transformers keeps attention within documents by `position_ids`, but only where it keeps no cache: set the model's
    config.use_cache to False (seen in 5.23).
    """
    num_tokens = len(part.input_T)
    input_ids, labels = np.zeros(row_tokens + 1, np.int64), np.full(row_tokens + 1, IGNORED)
    position_ids = np.zeros(row_tokens + 1, np.int64)
    input_ids[:num_tokens], labels[1 : num_tokens + 1] = part.input_T, part.target_T
    position_ids[:num_tokens] = np.arange(num_tokens) - np.repeat(part.bounds[:-1], np.diff(part.bounds))
    return dict(input_ids=input_ids, labels=labels, position_ids=position_ids)


FORMATS = {"packed": as_packed, "row": as_row, "hf": as_hf}


class Rows:
    """The rows of an order for another trainer, one after another; as `OrderDataset` a torch IterableDataset.

        rows = OrderDataset(stream, 1024, batch_rows=8, format="row")
        for batch in DataLoader(rows, batch_size=8, num_workers=2): ...

    A row holds `row_tokens` predictions. A global batch is `batch_rows` rows for each of `world` processes and is what
    `batches` calls a batch; the order's last one holds what is left, split evenly. `batch_rows` is the DataLoader's
    batch_size (1 with batch_size=None): then its workers deal whole batches, in order, whatever their number. Give
    `rank` and `world` unless the trainer deals rows to processes itself (Hugging Face's does).

    `format`: "row" (input_ids, targets), "packed" (input_ids, targets, bounds; of one row, so batch_size=None),
    "hf" (input_ids, labels, position_ids). `max_len` is the longest document.

    The state is the position in the stream, one integer, and the hashes that say of which. An order is passed over
    once: epochs belong into the order.
    """

    def __init__(
        self,
        stream: Stream,
        row_tokens: int,
        *,
        batch_rows: int = 1,
        format: str = "row",
        rank: int = 0,
        world: int = 1,
        max_len: int = UNCUT,
    ):
        if format not in FORMATS:
            raise InputError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
        if min(row_tokens, batch_rows, max_len) < 1 or not 0 <= rank < world:
            raise InputError(
                f"row_tokens {row_tokens}, batch_rows {batch_rows}, max_len {max_len}, rank {rank} of {world}: "
                "expected sizes of at least 1 and 0 <= rank < world"
            )
        self.stream, self.row_tokens, self.batch_rows, self.format = stream, row_tokens, batch_rows, format
        self.rank, self.world, self.max_len = rank, world, max_len
        self.round_tokens = row_tokens * world  # one row of every process
        self.batch_tokens = self.round_tokens * batch_rows
        self.steps = -(-stream.num_tokens // self.batch_tokens)
        self.tokens = 0  # the position: of what comes before it, this process's share has been handed out
        self._in_place = False  # in a DataLoader's worker: whether the position is already the worker's own

    def __len__(self) -> int:
        """Rows of the whole order for this process."""
        return self.steps * self.batch_rows

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        stride = self._take_place()
        if self.tokens >= self.steps * self.batch_tokens and worker_info() is None:
            raise InputError(
                f"the order's {self.stream.num_tokens} tokens are used up: make a longer order, "
                "or set the position back with load_state_dict"
            )
        first, done = divmod(self.tokens, self.batch_tokens)
        done //= self.round_tokens
        whole = plan(self.stream.num_tokens, self.batch_tokens, self.batch_rows * self.world, self.steps, self.max_len)
        for batch in planned(self.stream, whole, range(first, self.steps, stride), self.rank, self.world):
            parts = batch.parts + [NOTHING] * (self.batch_rows - len(batch.parts))
            for row in range(done, self.batch_rows):
                last = row + 1 == self.batch_rows
                next_step, next_row = (batch.step + stride, 0) if last else (batch.step, row + 1)
                # Before the row is handed out: whoever asks for the state next has got it.
                self.tokens = next_step * self.batch_tokens + next_row * self.round_tokens
                yield FORMATS[self.format](parts[row], self.row_tokens)
            done = 0

    def state_dict(self) -> dict:
        self._take_place()
        if self.world > 1 and self.tokens % self.batch_tokens:
            raise InputError(
                f"position {self.tokens}: inside a global batch of {self.world} processes, which no single position "
                "describes; ask for the state after a whole batch, or set batch_rows to the rows between two states"
            )
        hashes = dict(order_sha256=self.stream.order_sha256, segments_sha256=self.stream.segments.digest())
        return dict(version=STATE_VERSION, tokens=self.tokens, **hashes)

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken. Raises InputError for another order, or rows that do not begin there."""
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise InputError(f"not a loader's state of version {STATE_VERSION}: {str(state)[:80]}")
        ours = dict(order_sha256=self.stream.order_sha256, segments_sha256=self.stream.segments.digest())
        for key, mine in ours.items():
            if state.get(key) != mine:
                name = key.partition("_")[0]
                raise InputError(
                    f"the state is of another order: its {name} hash {str(state.get(key))[:12]}, ours {mine[:12]}; "
                    "resume with the order and the shards it was taken with"
                )
        unit = self.round_tokens if self.world == 1 else self.batch_tokens
        tokens = state.get("tokens")
        if not isinstance(tokens, int) or tokens < 0 or tokens % unit:
            raise InputError(
                f"position {tokens} of the state: expected a multiple of {unit} (row_tokens {self.row_tokens}, "
                f"batch_rows {self.batch_rows}, {self.world} processes); resume with the sizes it was taken with"
            )
        self.tokens = tokens
        # A state given inside a worker was taken in one, and says where that worker goes on.
        self._in_place = worker_info() is not None

    def _take_place(self) -> int:
        """Global batches from one of this iterator's to its next. Worker w begins w of them after its process."""
        info = worker_info()
        if info is None:
            return 1
        if not self._in_place and info.id:
            self.tokens += info.id * self.batch_tokens - self.tokens % self.batch_tokens
        self._in_place = True
        return info.num_workers


NOTHING = Packed(np.empty(0, np.uint16), np.empty(0, np.uint16), np.zeros(1, np.int32))


def worker_info():
    """The DataLoader worker this runs in, or None. Without torch there is none."""
    torch_data = sys.modules.get("torch.utils.data")
    return torch_data and torch_data.get_worker_info()


def __getattr__(name: str):
    """`OrderDataset` is made when first asked for: everything else here needs no torch."""
    if name != "OrderDataset":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch.utils.data import IterableDataset

    made = type(name, (Rows, IterableDataset), {"__module__": __name__, "__doc__": Rows.__doc__})
    return globals().setdefault(name, made)
