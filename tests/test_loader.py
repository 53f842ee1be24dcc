"""Batches hold every token of the order exactly once, whatever their size, whoever reads them, wherever they begin."""

import hashlib
import mmap
import os
import pickle
import subprocess
import sys
import threading
import time
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curriculum.loader import (
    FORMATS,
    Counters,
    OrderDataset,
    Packed,
    Rows,
    Stream,
    batches,
    is_cached,
    most_documents,
    open_stream,
    pinned,
    prefetched,
)
from data.cli import InputError
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


@pytest.mark.parametrize("world", [2, 3, 4, 6, 12])
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


# -- Sizes that change from step to step


@st.composite
def runs(draw, parts_of=1) -> dict:
    """Batch sizes, numbers of micro-batches and longest documents of every step of a run over the whole stream."""
    batch_tokens, held = [], 0
    while held < 5998:
        batch_tokens.append(draw(st.integers(300, 2500)))
        held += batch_tokens[-1]
    steps = len(batch_tokens)
    few = draw(st.lists(st.integers(1, 90), min_size=steps, max_size=steps))
    return dict(
        batch_tokens=batch_tokens,
        num_parts=[parts_of * n for n in draw(st.lists(st.integers(1, 3), min_size=steps, max_size=steps))],
        max_len=draw(st.sampled_from([few, sorted(few), few[0], 64, 2**62])),
        steps=steps,
    )


def cap_of(run: dict, step: int) -> int:
    return run["max_len"] if isinstance(run["max_len"], int) else run["max_len"][step]


@given(runs())
def test_schedules_of_sizes_change_nothing_in_the_order(stream, pairs, run):
    seen = list(batches(stream, **run))
    assert [pair for batch in seen for pair in flat(batch.parts)] == pairs
    assert [batch.num_tokens for batch in seen[:-1]] == run["batch_tokens"][:-1]
    assert [len(batch.parts) for batch in seen] == run["num_parts"]


@given(runs())
def test_documents_longer_than_allowed_are_cut_and_no_others(stream, run):
    ends, at = set(stream.end.tolist()), 0
    for batch in batches(stream, **run):
        cap = cap_of(run, batch.step)
        for part in batch.parts:
            expected, length = [0], 0  # a walk: a document ends with its segment, with the row, or when it is full
            for i in range(1, len(part.input_T) + 1):
                length += 1
                if at + i in ends or i == len(part.input_T) or length == cap:
                    expected.append(i)
                    length = 0
            assert part.bounds.tolist() == expected and part.bounds.dtype == np.int32
            at += len(part.input_T)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@settings(max_examples=10)
@given(run=runs(parts_of=24), data=st.data())
def test_with_schedules_too_every_world_size_sees_the_same_and_goes_on_the_same(stream, world, run, data):
    alone = list(batches(stream, **run))
    first = data.draw(st.integers(0, run["steps"]))
    ranks = [list(batches(stream, **run, first_step=first, rank=rank, world=world)) for rank in range(world)]
    for k, batch in enumerate(alone[first:]):
        parts = [part for of_rank in ranks for part in of_rank[k].parts]
        assert [of_rank[k].step for of_rank in ranks] == [batch.step] * world
        assert all(same(a, b) for a, b in zip(batch.parts, parts, strict=True))


@given(run=runs())
def test_room_for_documents_is_what_the_fullest_micro_batch_needs(stream, run):
    fullest = max(len(part.bounds) - 1 for batch in batches(stream, **run) for part in batch.parts)
    assert most_documents(stream, **run) == fullest


def test_room_for_documents_where_short_ones_cluster(corpus):
    segments = corpus_segments(corpus, MAX_LEN)
    for ids in (
        np.argsort(segments.length_N),
        np.argsort(-segments.length_N),
        np.repeat(segments.length_N.argmin(), 9),
    ):
        stream = Stream(corpus, segments, ids)
        for batch_tokens, parts in ((30, 1), (200, 1), (200, 7), (stream.num_tokens, 1), (stream.num_tokens, 5)):
            run = dict(batch_tokens=batch_tokens, num_parts=parts, steps=steps_in(stream, batch_tokens))
            fullest = max(len(part.bounds) - 1 for batch in batches(stream, **run) for part in batch.parts)
            assert most_documents(stream, **run) == fullest


# -- Counted


@given(run=runs(parts_of=2))
def test_counters_count_every_token_and_segment_once(stream, run):
    both = [sum_of(batches(stream, **run, rank=rank, world=2)) for rank in range(2)]
    parts = [(part, cap_of(run, b.step)) for b in batches(stream, **run) for part in b.parts]
    # A segment is cut if an end of a micro-batch, or a multiple of the longest document from where it begins, is in it.
    begins, cut, at = (stream.end - stream.segments.length_N[stream.ids]).tolist(), 0, 0
    row_of = {}
    for part, cap in parts:
        row_of |= {i: (at + len(part.input_T), cap) for i in range(at, at + len(part.input_T))}
        at += len(part.input_T)
    for begin, end in zip(begins, stream.end.tolist(), strict=True):
        row_end, cap = row_of[begin]
        cut += end > row_end or end - begin > cap
    both[0].add(both[1])
    assert (both[0].tokens, both[0].segments, both[0].cut_segments) == (stream.num_tokens, len(stream.ids), cut)
    assert both[0].bytes_read >= 2 * stream.num_tokens and both[0].wait_seconds == 0


def sum_of(items) -> Counters:
    total = Counters()
    for batch in items:
        total.add(batch.counts)
    return total


def test_the_taker_learns_how_long_it_waited(stream):
    def slowly():
        for batch in batches(stream, BATCH, PARTS, steps=3):
            time.sleep(0.05)
            yield batch

    counters, tokens = Counters(), 0
    for batch in prefetched(slowly(), counters=counters):
        tokens += batch.num_tokens
        assert counters.tokens == tokens  # of what was handed out, not of what lies ready
    assert 0.1 < counters.wait_seconds < 10


# -- Pages


def test_pages_are_asked_for_before_they_are_read(corpus, stream, monkeypatch):
    events = []

    class Map:
        def __init__(self, shard):
            self.shard = shard

        def madvise(self, advice, start, length):
            assert advice == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
            events.append(("touch", self.shard, start, start + length))

    def gather(self, places):
        events.extend(("read", *at) for at in zip(places.shard, places.start, places.stop, strict=True))
        return read(self, places)

    read = Stream.gather
    monkeypatch.setattr(stream, "_maps", [Map(shard) for shard in range(len(corpus.paths))])
    monkeypatch.setattr(Stream, "gather", gather)
    monkeypatch.setattr("curriculum.loader.is_cached", lambda path, offset: False)
    list(batches(stream, BATCH, PARTS, steps=12))
    touched = set()
    for kind, shard, begin, end in events:
        if kind == "touch":
            touched |= {(shard, byte) for byte in range(begin, end)}
        else:  # 256 int32 of header, then 2 bytes a token; targets lie one token further
            assert {(shard, byte) for byte in range(1024 + 2 * begin, 1024 + 2 * end + 2)} <= touched
    first_read = [kind for kind, *_ in events].index("read")
    assert sum(kind == "touch" for kind, *_ in events[:first_read]) > len(events) / 2 / 12  # two batches ahead of one


@pytest.mark.parametrize(("cached", "asked"), [(lambda shard: True, False), (lambda shard: shard != 1, True)])
def test_pages_that_are_in_memory_are_not_asked_for(corpus, stream, monkeypatch, cached, asked):
    """And one page missing among those looked at is reason enough."""
    calls = []

    class Map:
        def madvise(self, *advice):
            calls.append(advice)

    monkeypatch.setattr(stream, "_maps", [Map() for _ in corpus.paths])
    monkeypatch.setattr("curriculum.loader.is_cached", lambda path, offset: cached(corpus.paths.index(path)))
    places = stream.places([0, 2500, 5000])
    stream.touch(places)
    assert len(calls) == (len(places.start) if asked else 0)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"), reason="not Linux")
def test_the_page_cache_is_asked(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    if not is_cached(path, 0):
        pytest.skip("this file system cannot tell")
    assert is_cached(path, (1 << 20) - 1) and not is_cached(path, 1 << 20)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(path, 0):
        pytest.skip("this file system keeps its pages")
    with open(path, "rb") as file:
        file.read()
    assert is_cached(path, 0)


def test_a_stream_goes_to_another_process_without_its_tokens(stream):
    packed = pickle.dumps(stream)
    again = pickle.loads(packed)
    assert same(again.read(17, 5000), stream.read(17, 5000)) and again.order_sha256 == stream.order_sha256
    tables = sum(x.nbytes for x in (*vars(stream.segments).values(), stream.ids) if isinstance(x, np.ndarray))
    assert len(packed) < tables + 5000 < tables + 2 * stream.num_tokens


def test_arrays_are_new_and_writable_and_pinned_ones_are_tensors(stream):
    import torch

    [batch] = batches(stream, BATCH, 2, steps=1)
    tensors = pinned(batch, "cpu")
    for part, held in zip(batch.parts, tensors.parts, strict=True):
        assert part.input_T.flags.writeable and part.target_T.flags.writeable
        assert held.input_T.dtype == torch.uint16 and held.bounds.dtype == torch.int32
        assert held.input_T.long().tolist() == part.input_T.tolist()
    assert tensors.counts is batch.counts and tensors.num_tokens == batch.num_tokens


# -- Rows for other trainers


def predictions(items) -> list[tuple[int, int]]:
    """(input, target) of all that is learned from: for an HF model, position i against labels[i + 1]."""
    found = []
    for item in items:
        if "labels" in item:
            inputs, targets = item["input_ids"][:-1], item["labels"][1:]
            assert item["labels"][0] == -100
        else:
            inputs, targets = item["input_ids"], item["targets"]
        found += [(int(a), int(b)) for a, b in zip(inputs, targets, strict=True) if b != -100]
    return found


def same_items(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("format", FORMATS)
@given(row_tokens=st.integers(40, 7000), batch_rows=st.integers(1, 5), max_len=st.sampled_from([9, 2**62]))
def test_rows_hold_the_order(stream, pairs, format, row_tokens, batch_rows, max_len):
    rows = Rows(stream, row_tokens, batch_rows=batch_rows, format=format, max_len=max_len)
    items = list(rows)
    assert predictions(items) == pairs and len(items) == len(rows)
    if format != "packed":
        assert {len(item["input_ids"]) for item in items} == {row_tokens + (format == "hf")}


def test_positions_begin_anew_with_every_document(stream):
    packed, hf = (list(Rows(stream, 500, format=format, max_len=40)) for format in ("packed", "hf"))
    for a, b in zip(packed, hf, strict=True):
        num_tokens = len(a["input_ids"])
        assert np.flatnonzero(b["position_ids"][:num_tokens] == 0).tolist() == a["bounds"][:-1].tolist()
        assert set(np.diff(b["position_ids"][:num_tokens])[np.diff(b["position_ids"][:num_tokens]) > 0]) == {1}
        assert not b["position_ids"][num_tokens:].any()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_processes_share_the_rows_of_a_global_batch(stream, world):
    alone = list(Rows(stream, 50, batch_rows=24))
    ranks = [list(Rows(stream, 50, batch_rows=24 // world, rank=rank, world=world)) for rank in range(world)]
    share = 24 // world
    dealt = [row for k in range(len(alone) // 24) for rows in ranks for row in rows[k * share : (k + 1) * share]]
    assert same_items(dealt, alone)


@settings(max_examples=25)
@given(st.integers(0, 120), st.sampled_from([1, 3, 4]), st.sampled_from(["row", "hf", "packed"]))
def test_rows_go_on_where_their_state_was_taken(stream, taken, batch_rows, format):
    def rows():
        return Rows(stream, 50, batch_rows=batch_rows, format=format)

    never_stopped, first, second = list(rows()), rows(), rows()
    before = list(islice(first, taken))
    assert first.state_dict()["tokens"] == 50 * len(before)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    if taken >= len(never_stopped):
        with pytest.raises(InputError, match="the order's 5998 tokens are used up"):
            list(second)
    else:
        assert same_items(before + list(second), never_stopped)
        assert same_items(before + list(first), never_stopped)  # the same object just goes on


@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 1), (1, 8), (3, 3)])
def test_another_number_of_processes_goes_on_after_a_global_batch(stream, old, new):
    def of(world):
        return [Rows(stream, 50, batch_rows=24 // world, rank=rank, world=world) for rank in range(world)]

    never_stopped, states = list(Rows(stream, 50, batch_rows=24)), []
    for rows in of(old):
        list(islice(rows, 3 * 24 // old))
        states.append(rows.state_dict())
    assert all(state == states[0] for state in states) and states[0]["tokens"] == 3 * 24 * 50
    ranks = []
    for rows in of(new):
        rows.load_state_dict(states[0])
        ranks.append(list(rows))
    share = 24 // new
    dealt = [row for k in range(len(ranks[0]) // share) for rows in ranks for row in rows[k * share : (k + 1) * share]]
    assert same_items(dealt, never_stopped[3 * 24 :])


def test_a_state_of_another_order_is_refused_with_both_hashes(corpus, stream):
    other = Stream(corpus, stream.segments, stream.ids[::-1])
    state = Rows(stream, 50).state_dict()
    with pytest.raises(InputError) as refused:
        Rows(other, 50).load_state_dict(state)
    assert "another order" in str(refused.value)
    assert stream.order_sha256[:12] in str(refused.value) and other.order_sha256[:12] in str(refused.value)
    # The same ids over shards cut otherwise are other texts.
    tables = [corpus_segments(corpus, max_len) for max_len in (MAX_LEN, MAX_LEN + 1)]
    one, two = (Rows(Stream(corpus, table, np.arange(10)), 50) for table in tables)
    with pytest.raises(InputError, match=f"segments hash {tables[0].digest()[:12]}, ours {tables[1].digest()[:12]}"):
        two.load_state_dict(one.state_dict())


def test_states_and_sizes_that_cannot_be_are_refused(stream):
    rows = Rows(stream, 50, batch_rows=4, rank=1, world=2)
    next(iter(rows))
    with pytest.raises(InputError, match="position 100: inside a global batch of 2 processes"):
        rows.state_dict()
    good = Rows(stream, 50).state_dict()
    for tokens in (30, -50, 1.5, None):
        with pytest.raises(InputError, match=f"position {tokens} of the state: expected a multiple of 50"):
            Rows(stream, 50).load_state_dict(good | {"tokens": tokens})
    with pytest.raises(InputError, match="position 100 of the state: expected a multiple of 400"):
        rows.load_state_dict(good | {"tokens": 100})
    for state in ({}, [], good | {"version": 2}):
        with pytest.raises(InputError, match="not a loader's state of version 1"):
            Rows(stream, 50).load_state_dict(state)
    with pytest.raises(InputError, match="format 'rows': expected one of packed, row, hf"):
        Rows(stream, 50, format="rows")
    for sizes in (dict(row_tokens=0), dict(row_tokens=9, batch_rows=0), dict(row_tokens=9, rank=2, world=2)):
        with pytest.raises(InputError, match="expected sizes of at least 1 and 0 <= rank < world"):
            Rows(stream, **sizes)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_workers_of_a_dataloader_deal_whole_batches_in_order(stream, workers):
    from torch.utils.data import DataLoader, IterableDataset

    def batches_from(rows):
        loaded = DataLoader(rows, batch_size=4, num_workers=workers)
        return [{key: value.numpy() for key, value in batch.items()} for batch in loaded]

    def rows():
        made = OrderDataset(stream, 50, batch_rows=4)
        assert isinstance(made, IterableDataset) and made.state_dict()["tokens"] == 0  # asking moves nothing
        return made

    expected = list(Rows(stream, 50, batch_rows=4))
    expected = [{k: np.stack([x[k] for x in expected[i : i + 4]]) for k in expected[0]} for i in range(0, 120, 4)]
    assert same_items(batches_from(rows()), expected)
    resumed = rows()
    resumed.load_state_dict(resumed.state_dict() | {"tokens": 5 * 4 * 50})
    assert same_items(batches_from(resumed), expected[5:])


def test_a_dataset_goes_to_a_process_that_is_started_anew(stream):
    rows = OrderDataset(stream, 50, batch_rows=4, format="hf")
    before = list(islice(rows, 9))
    again = pickle.loads(pickle.dumps(rows))
    assert type(again) is OrderDataset
    assert same_items(before + list(again), list(Rows(stream, 50, batch_rows=4, format="hf")))


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:'set_vital'")
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("taken", [0, 1, 4, 29])
def test_torchdatas_stateful_loader_goes_on_exactly(stream, workers, taken):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        return stateful.StatefulDataLoader(OrderDataset(stream, 50, batch_rows=4), batch_size=4, num_workers=workers)

    never_stopped = [{k: v.numpy() for k, v in batch.items()} for batch in loader()]
    first, second = loader(), loader()
    before = [{k: v.numpy() for k, v in batch.items()} for batch in islice(first, taken)]
    second.load_state_dict(first.state_dict())
    after = [{k: v.numpy() for k, v in batch.items()} for batch in second]
    assert same_items(before + after, never_stopped)


def test_without_torch_everything_but_the_torch_dataset_is_there():
    code = "import sys, curriculum.loader as l; l.Rows, l.Stream; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    with pytest.raises(ImportError, match="cannot import name 'OrderDatasets'"):
        from curriculum.loader import OrderDatasets  # noqa: F401


def test_an_order_file_is_opened_with_its_shards(tiny_corpus, corpus, tmp_path):
    """Its hash is that of the manifest; an order of other shards is refused."""
    from curriculum.order import save_order

    segments = corpus_segments(corpus, MAX_LEN)
    ids = np.random.default_rng(3).permutation(len(segments))
    recipe = dict(measure="nll", schedule="random", bins=4, multiset="exact", budget_tokens=0, subset_seed=0)
    about = dict(max_len=MAX_LEN, unit="document", corpus_tokens=segments.num_tokens)
    for name, digest in (("good", segments.digest()), ("bad", hashlib.sha256().hexdigest())):
        scores = dict(id="0" * 12, segments_sha256=digest)
        save_order(tmp_path / f"{name}.npy", ids, recipe | about | dict(scores=scores))
    stream = open_stream(tiny_corpus, tmp_path / "good.npy")
    assert same(stream.read(5, 3000), Stream(corpus, segments, ids).read(5, 3000))
    assert stream.order_sha256 == Stream(corpus, segments, ids).order_sha256
    assert f'"order_sha256": "{stream.order_sha256}"' in (tmp_path / "good.json").read_text()
    with pytest.raises(InputError, match="an order of other shards"):
        open_stream(tiny_corpus, tmp_path / "bad.npy")
    stock = open_stream(tiny_corpus, max_len=MAX_LEN)
    assert stock.ids.tolist() == list(range(len(segments))) and stock.num_tokens == 5998


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
