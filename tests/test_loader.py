"""Batches hold every token of the order exactly once, whatever their size, whoever reads them, wherever they begin."""

import threading
import time
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.loader import Packed, Stream, batches, prefetched
from data.segments import corpus_segments
from data.shards import open_corpus, read_shard

MAX_LEN = 64
BATCH, PARTS = 500, 12  # 5,998 tokens to train on: 11 whole batches and 498 tokens


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return open_corpus(tiny_corpus)


@pytest.fixture(scope="module", params=["document", "window"])
def stream(corpus, request):
    """The tiny corpus in a shuffled order."""
    segments = corpus_segments(corpus, MAX_LEN, request.param)
    return Stream(corpus, segments, np.random.default_rng(0).permutation(len(segments)))


@pytest.fixture(scope="module")
def pairs(corpus, stream):
    """The oracle: (input, target) of every prediction in training order, one by one from the shards."""
    shards, table, found = [read_shard(path) for path in corpus.paths], stream.segments, []
    for i in stream.ids.tolist():
        shard, start = shards[table.shard_N[i]], int(table.start_N[i])
        found += [(int(shard[at]), int(shard[at + 1])) for at in range(start, start + int(table.length_N[i]))]
    return found


def steps_in(stream: Stream, batch_tokens: int) -> int:
    return -(-stream.num_tokens // batch_tokens)


def flat(parts: list[Packed]) -> list[tuple[int, int]]:
    return [pair for part in parts for pair in zip(part.input_T.tolist(), part.target_T.tolist(), strict=True)]


def same(a: Packed, b: Packed) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# -- Exactly once


@given(batch_tokens=st.integers(60, 7000), num_parts=st.integers(1, 8))
def test_the_batches_are_the_order_cut_up(stream, pairs, batch_tokens, num_parts):
    seen = list(batches(stream, batch_tokens, num_parts, steps=steps_in(stream, batch_tokens)))
    assert [pair for batch in seen for pair in flat(batch.parts)] == pairs
    assert [batch.step for batch in seen] == list(range(len(seen)))
    assert [batch.num_tokens for batch in seen] == [len(flat(batch.parts)) for batch in seen]
    assert all(batch.num_tokens == batch_tokens for batch in seen[:-1])


@pytest.mark.parametrize(("batch_tokens", "num_parts"), [(1, 1), (1, 4), (3, 2)])
def test_a_batch_may_be_smaller_than_any_segment(stream, pairs, batch_tokens, num_parts):
    seen = batches(stream, batch_tokens, num_parts, steps=200)
    assert [pair for batch in seen for pair in flat(batch.parts)] == pairs[: 200 * batch_tokens]


@given(st.tuples(st.integers(0, 5997), st.integers(0, 5997)).filter(lambda ends: ends[0] != ends[1]))
def test_any_stretch_of_the_stream_can_be_read(stream, pairs, ends):
    begin, end = sorted(ends)
    assert flat([stream.read(begin, end)]) == pairs[begin:end]


def test_the_last_batch_holds_what_is_left_split_evenly(stream):
    *_, last = batches(stream, BATCH, PARTS, steps=12)
    assert last.num_tokens == 498
    assert {len(part.input_T) for part in last.parts} == {41, 42} and len(last.parts) == PARTS


def test_a_last_batch_of_fewer_tokens_than_micro_batches_leaves_some_empty(stream, pairs):
    batch_tokens = stream.num_tokens - 5
    for world in (1, 4):
        lasts = [list(batches(stream, batch_tokens, 8, steps=2, rank=r, world=world))[-1] for r in range(world)]
        assert {batch.num_tokens for batch in lasts} == {5}
        assert sorted(pair for batch in lasts for pair in flat(batch.parts)) == sorted(pairs[-5:])


# -- The same for all


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_world_size_sees_the_same_micro_batches(stream, world):
    alone = list(batches(stream, BATCH, PARTS, steps=12))
    ranks = [list(batches(stream, BATCH, PARTS, steps=12, rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(alone):
        shared = [of_rank[step] for of_rank in ranks]
        assert {b.num_tokens for b in shared} == {batch.num_tokens}
        assert [len(b.parts) for b in shared] == [PARTS // world] * world
        for part, other in zip(batch.parts, [part for b in shared for part in b.parts], strict=True):
            assert same(part, other)


@pytest.mark.parametrize("first_step", [1, 7, 11, 12])
def test_beginning_at_a_step_is_skipping_to_it(stream, first_step):
    skipped = list(batches(stream, BATCH, PARTS, steps=12))[first_step:]
    resumed = list(batches(stream, BATCH, PARTS, first_step=first_step, steps=12))
    assert [b.step for b in resumed] == [b.step for b in skipped]
    for a, b in zip(resumed, skipped, strict=True):
        assert all(same(x, y) for x, y in zip(a.parts, b.parts, strict=True))


def test_a_step_holds_the_same_tokens_however_it_is_cut(stream):
    cuts = [[flat(batch.parts) for batch in batches(stream, BATCH, parts, steps=12)] for parts in (1, 4, 5)]
    assert cuts[0] == cuts[1] == cuts[2]


# -- Documents


def documents(part: Packed) -> list[tuple[np.ndarray, np.ndarray]]:
    assert part.bounds[0] == 0 and part.bounds[-1] == len(part.input_T) == len(part.target_T)
    assert part.bounds.dtype == np.int32 and np.all(np.diff(part.bounds) >= 1)
    return list(zip(*(np.split(x, part.bounds[1:-1]) for x in (part.input_T, part.target_T)), strict=True))


def test_within_a_document_the_target_is_the_next_input(stream):
    for batch in batches(stream, BATCH, PARTS, steps=12):
        for part in batch.parts:
            for inputs, targets in documents(part):
                assert inputs[1:].tolist() == targets[:-1].tolist() and len(inputs) <= MAX_LEN


@pytest.mark.parametrize("batch_tokens", [97, BATCH, 5998])
def test_a_document_never_reaches_into_the_next(corpus, batch_tokens):
    segments = corpus_segments(corpus, MAX_LEN)
    stream = Stream(corpus, segments, np.random.default_rng(1).permutation(len(segments)))
    num_starts = 0
    for batch in batches(stream, batch_tokens, 3, steps=steps_in(stream, batch_tokens)):
        for part in batch.parts:
            for inputs, _ in documents(part):
                assert corpus.bos_id not in inputs[1:]
                num_starts += inputs[0] == corpus.bos_id
    assert num_starts == sum((read_shard(path)[:-1] == corpus.bos_id).sum() for path in corpus.paths)


def test_a_segment_cut_by_a_micro_batch_is_cut_nowhere_else(stream):
    """Bounds are the ends of segments and of the micro-batch, and nothing more."""
    ends, at = set(stream.end.tolist()), 0
    for batch in batches(stream, BATCH, PARTS, steps=12):
        for part in batch.parts:
            size = len(part.input_T)
            assert set(part.bounds[1:].tolist()) == {e - at for e in ends if at < e <= at + size} | {size}
            at += size


# -- Made ahead


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_prefetched_items_come_in_order_and_once(items, depth):
    assert list(prefetched(iter(items), depth)) == items


@pytest.mark.parametrize("error", [ValueError("disk"), KeyboardInterrupt()])
def test_an_exception_comes_after_the_items_before_it(error):
    def source():
        yield from (1, 2)
        raise error

    seen = []
    with pytest.raises(type(error)) as raised:
        for item in prefetched(source()):
            seen.append(item)
    assert seen == [1, 2] and raised.value is error


def test_no_more_is_made_ahead_than_asked_for():
    made = []
    items = prefetched((made.append(i) or i for i in count()), depth=3)
    assert list(islice(items, 5)) == [0, 1, 2, 3, 4]
    time.sleep(0.05)
    assert len(made) <= 5 + 3 + 1  # taken, in the queue, and one in the thread's hand
    items.close()


def threads_left(items) -> bool:
    """Whether a thread outlives an iterator that is closed after its first item; waits half a second for it to end."""
    before = set(threading.enumerate())
    next(items)
    time.sleep(0.05)
    items.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(0.5)
    return bool(set(threading.enumerate()) - before)


def test_closing_early_ends_the_thread():
    assert not threads_left(prefetched(count()))


def test_closing_early_ends_a_thread_that_has_finished_its_work():
    assert not threads_left(prefetched(iter(range(3)), depth=2))
