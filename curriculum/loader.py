"""From an order to batches: packed documents by token position. The whole state is one integer.

The order lays segments end to end into one stream of tokens. Step k reads stream[k * batch : (k + 1) * batch], cut
into a fixed number of micro-batches, so 1, 2, 4 or 8 processes see identical ones and share them out. A segment that
straddles a micro-batch's end is cut there, and its rest begins the next one as a document of its own; every token is
used exactly once. The last batch holds what is left, split evenly.
"""

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data.segments import Segments
from data.shards import Corpus, read_shard


class Packed(NamedTuple):
    """One flat row of T tokens holding whole or cut segments."""

    input_T: np.ndarray  # uint16
    target_T: np.ndarray  # uint16, the true next token of each input
    bounds: np.ndarray  # int32, (num_documents + 1,): document d is input_T[bounds[d]:bounds[d + 1]]


class Batch(NamedTuple):
    step: int
    num_tokens: int  # in the whole batch, over all processes
    parts: list[Packed]  # this process's micro-batches


class Stream:
    """Random access to the tokens of segments laid end to end in a given order."""

    def __init__(self, corpus: Corpus, segments: Segments, ids: np.ndarray):
        self.shards = [read_shard(path) for path in corpus.paths]
        self.segments, self.ids = segments, ids
        self.end = np.cumsum(segments.length_N[ids], dtype=np.int64)
        self.num_tokens = int(self.end[-1]) if len(ids) else 0

    def read(self, begin: int, end: int) -> Packed:
        """Tokens begin..end of the stream, 0 <= begin < end <= num_tokens."""
        assert 0 <= begin < end <= self.num_tokens
        first, last = np.searchsorted(self.end, [begin, end - 1], side="right")
        ids = self.ids[first : last + 1]
        start = self.segments.start_N[ids]
        length = self.segments.length_N[ids].astype(np.int64)
        skipped = begin - (self.end[first] - length[0])
        start[0] += skipped
        length[0] -= skipped
        length[-1] -= self.end[last] - end
        # One slice serves inputs and targets: each is read with the token after it.
        slices = [
            self.shards[shard][at : at + size + 1]
            for shard, at, size in zip(
                self.segments.shard_N[ids].tolist(), start.tolist(), length.tolist(), strict=True
            )
        ]
        bounds = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
        return Packed(np.concatenate([s[:-1] for s in slices]), np.concatenate([s[1:] for s in slices]), bounds)


def batches(
    stream: Stream, batch_tokens: int, num_parts: int, *, first_step: int = 0, steps: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Batches first_step .. steps-1 as process `rank` of `world` sees them; `num_parts` is a multiple of `world`."""
    assert num_parts % world == 0
    for step in range(first_step, steps):
        begin = step * batch_tokens
        num_tokens = min(batch_tokens, stream.num_tokens - begin)
        assert num_tokens > 0, "steps beyond the end of the order"
        cuts = [begin + num_tokens * i // num_parts for i in range(num_parts + 1)]
        mine = range(rank * num_parts // world, (rank + 1) * num_parts // world)
        spans = [(cuts[i], cuts[i + 1]) for i in mine]
        # A last batch of fewer tokens than micro-batches leaves some empty.
        yield Batch(step, num_tokens, [stream.read(a, b) for a, b in spans if b > a])


def prefetched(items: Iterator, depth: int = 2) -> Iterator:
    """The same items, made ahead in a thread; an exception there is raised here."""
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
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        done.set()
