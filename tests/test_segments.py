"""Segments tile the tokens of a shard, stay inside documents, and are what a slow loop over the tokens finds."""

import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import segments as module
from data.cli import InputError
from data.segments import UNITS, corpus_segments, find_segments, packed_rows, scan_segments
from data.shards import open_corpus, read_shard, write_shard

BOS = 0  # one token in four: documents of no text, runs of BOS, BOS at either end
shards = st.lists(st.integers(0, 3), min_size=1, max_size=60).map(lambda ids: np.array(ids, np.uint16))
units = st.sampled_from(UNITS)


def slow_segments(tokens: list[int], max_len: int, unit: str) -> tuple[list[int], list[int]]:
    """A walk over the predictions: a new piece at a BOS (of a document) and where a piece is full."""
    start, length = [], []
    for i, token in enumerate(tokens[:-1]):
        if not start or length[-1] == max_len or (unit == "document" and token == BOS):
            start.append(i)
            length.append(0)
        length[-1] += 1
    return start, length


@given(shards, st.integers(1, 9), units)
def test_segments_are_those_of_a_slow_walk(tokens, max_len, unit):
    start, length = find_segments(tokens, BOS, max_len, unit)
    assert (start.tolist(), length.tolist()) == slow_segments(tokens.tolist(), max_len, unit)
    assert (start.dtype, length.dtype) == (np.int64, np.int32)


@given(shards, st.integers(1, 9), units)
def test_segments_tile_all_tokens_but_the_last(tokens, max_len, unit):
    start, length = find_segments(tokens, BOS, max_len, unit)
    covered = [i for s, n in zip(start.tolist(), length.tolist(), strict=True) for i in range(s, s + n)]
    assert covered == list(range(len(tokens) - 1))


@given(shards, st.integers(1, 9))
def test_no_piece_of_a_document_holds_the_start_of_another(tokens, max_len):
    for s, n in zip(*find_segments(tokens, BOS, max_len), strict=True):
        assert n <= max_len and BOS not in tokens[s + 1 : s + n]


def test_a_long_document_gives_full_pieces_and_a_shorter_last_one():
    tokens = np.array([BOS] + [5] * 10 + [BOS, 5], np.uint16)
    start, length = find_segments(tokens, BOS, 4)
    assert start.tolist() == [0, 4, 8, 11] and length.tolist() == [4, 4, 3, 1]


def test_a_shard_may_begin_inside_a_document():
    start, length = find_segments(np.array([7, 7, 7, BOS, 7, 7], np.uint16), BOS, 8)
    assert start.tolist() == [0, 3] and length.tolist() == [3, 2]


def test_the_last_token_of_a_shard_is_only_a_target():
    """Also where it is a BOS: a document of no prediction is no segment."""
    start, length = find_segments(np.array([BOS, 7, 7, BOS], np.uint16), BOS, 8)
    assert start.tolist() == [0] and length.tolist() == [3]
    for unit in UNITS:
        assert [len(x) for x in find_segments(np.array([BOS], np.uint16), BOS, 8, unit)] == [0, 0]


def test_windows_ignore_documents():
    start, length = find_segments(np.array([BOS, 7, BOS, 7, BOS, 7, 7, 7], np.uint16), BOS, 3, "window")
    assert start.tolist() == [0, 3, 6] and length.tolist() == [3, 3, 1]


def test_unknown_units_and_empty_pieces_are_refused():
    tokens = np.zeros(5, np.uint16)
    with pytest.raises(InputError, match="unit 'line': expected one of document, window"):
        find_segments(tokens, BOS, 8, "line")
    for max_len in (0, -3):
        with pytest.raises(InputError, match=f"max_len {max_len}: a segment needs at least 1 token"):
            find_segments(tokens, BOS, max_len)


# -- A corpus


@pytest.mark.parametrize("unit", UNITS)
def test_a_corpus_is_its_shards_one_after_another(tiny_corpus, unit):
    corpus = open_corpus(tiny_corpus)
    segments = corpus_segments(corpus, 64, unit)
    assert segments.num_tokens == sum(len(read_shard(path)) - 1 for path in corpus.paths)
    for index, path in enumerate(corpus.paths):
        of_shard = segments.shard_N == index
        start, length = find_segments(read_shard(path), corpus.bos_id, 64, unit)
        assert segments.start_N[of_shard].tolist() == start.tolist()
        assert segments.length_N[of_shard].tolist() == length.tolist()
    assert np.all(np.diff(segments.shard_N) >= 0) and len(segments) == len(segments.start_N)


def test_a_document_cut_by_a_shards_end_is_two_segments(tiny_corpus):
    """The tiny corpus is cut like FineWeb: its second shard begins inside a document."""
    corpus = open_corpus(tiny_corpus)
    first, second = map(read_shard, corpus.paths)
    assert second[0] != corpus.bos_id
    segments = corpus_segments(corpus, 10_000)
    before, after = np.flatnonzero(segments.start_N == 0)[1] + [-1, 0]
    assert first[segments.start_N[before]] == corpus.bos_id
    assert segments.start_N[before] + segments.length_N[before] == len(first) - 1
    assert second[segments.length_N[after]] == corpus.bos_id  # its last target is the next document's BOS


def test_the_digest_says_whether_ids_mean_the_same_places(tiny_corpus):
    corpus, val = open_corpus(tiny_corpus), open_corpus(tiny_corpus, "val")
    assert corpus_segments(corpus, 64).digest() == corpus_segments(corpus, 64).digest()
    tables = [
        corpus_segments(corpus, 64),
        corpus_segments(corpus, 63),
        corpus_segments(corpus, 64, "window"),
        corpus_segments(val, 64),
    ]
    for column in ("shard_N", "start_N", "length_N"):
        tables.append(replace(tables[0], **{column: getattr(tables[0], column) + 1}))
    assert len({table.digest() for table in tables}) == len(tables)


def test_a_corpus_without_a_prediction_is_refused(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"x_train_{number}.bin", np.array([50256]))
    with pytest.raises(InputError, match="the corpus is empty: 2 shards hold no token with a target"):
        corpus_segments(open_corpus(tmp_path, quiet=True), 64)
    write_shard(tmp_path / "x_train_2.bin", np.array([50256, 1]))
    segments = corpus_segments(open_corpus(tmp_path, quiet=True), 64)
    assert segments.shard_N.tolist() == [2] and segments.num_tokens == 1


def test_tokens_of_another_tokenizer_are_refused(make_tiny_corpus, tmp_path):
    folder = make_tiny_corpus(tmp_path / "corpus")
    write_shard(folder / "tiny_train_000002.bin", np.array([256, 257]))
    with pytest.raises(InputError, match=r"tiny_train_000002\.bin: token id 257, but the vocabulary has 257 ids"):
        corpus_segments(open_corpus(folder), 64)


# -- The cache


@pytest.fixture
def own(make_tiny_corpus, tmp_path, monkeypatch):
    """A corpus of this test's own, small but cached, and with a home of its own."""
    monkeypatch.setattr(module, "CACHED_FROM_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return open_corpus(make_tiny_corpus(tmp_path / "corpus", num_shards=3))


@pytest.fixture
def scans(monkeypatch):
    """What was scanned, call by call."""
    calls = []
    monkeypatch.setattr(module, "scan_segments", lambda *args: calls.append(args) or scan_segments(*args))
    return calls


def caches(corpus) -> list:
    return sorted(corpus.folder.glob(".segments-*"))


def equal(a, b) -> bool:
    columns = ("shard_N", "start_N", "length_N")
    same = all(np.array_equal(getattr(a, x), getattr(b, x)) for x in columns)
    kinds = all(getattr(a, x).dtype == getattr(b, x).dtype for x in columns)
    return same and kinds and a.fingerprints == b.fingerprints and a.digest() == b.digest()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("max_len", [1, 7, 64, 10_000])
def test_what_the_cache_gives_back_is_what_a_scan_finds(own, scans, max_len, unit):
    made, found, fresh = (f(own, max_len, unit) for f in (corpus_segments, corpus_segments, scan_segments))
    assert len(scans) == 1 and equal(made, fresh) and equal(found, fresh)
    # Its digest is known without looking at the columns; theirs is the same.
    assert replace(found).digest() == found.digest() == replace(fresh).digest()


def test_every_way_of_cutting_has_a_cache_of_its_own(own, scans):
    ways = [(64, "document"), (63, "document"), (64, "window")]
    for max_len, unit in ways * 2:
        assert equal(corpus_segments(own, max_len, unit), scan_segments(own, max_len, unit))
    assert len(scans) == len(caches(own)) == 3
    some = replace(own, paths=own.paths[1:])
    assert equal(corpus_segments(some, 64), scan_segments(some, 64)) and len(scans) == 4


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_shard_of_one_token_has_a_place_in_the_cache(own, scans, shard):
    write_shard(own.paths[shard], np.array([256]))
    assert equal(corpus_segments(own, 64), corpus_segments(own, 64)) and len(scans) == 1
    assert equal(corpus_segments(own, 64), scan_segments(own, 64))


def swap_two_tokens(path) -> None:
    tokens = np.array(read_shard(path))
    at = np.flatnonzero(tokens == 256)[-1]
    tokens[[at, at - 1]] = tokens[[at - 1, at]]
    write_shard(path, tokens)


def test_a_shard_written_again_is_scanned_again(own, scans):
    before = corpus_segments(own, 64)
    swap_two_tokens(own.paths[1])
    after = corpus_segments(own, 64)
    assert len(scans) == 2 and equal(after, scan_segments(own, 64)) and after.digest() != before.digest()
    assert equal(corpus_segments(own, 64), after) and len(scans) == 2 and len(caches(own)) == 1


def test_new_content_is_noticed_under_the_old_time_and_a_new_time_under_the_old_content(own, scans):
    corpus_segments(own, 64)
    about = own.paths[1].stat()
    swap_two_tokens(own.paths[1])
    os.utime(own.paths[1], ns=(about.st_atime_ns, about.st_mtime_ns))
    assert equal(corpus_segments(own, 64), scan_segments(own, 64)) and len(scans) == 2
    os.utime(own.paths[1], ns=(0, 1))
    assert equal(corpus_segments(own, 64), scan_segments(own, 64)) and len(scans) == 3


def test_another_bos_or_vocabulary_is_another_key(own, scans):
    corpus_segments(own, 64)
    assert equal(corpus_segments(replace(own, bos_id=ord("e")), 64), scan_segments(replace(own, bos_id=ord("e")), 64))
    with pytest.raises(InputError, match="token id 256, but the vocabulary has 200 ids"):
        corpus_segments(replace(own, vocab_size=200), 64)


@given(st.data())
def test_a_damaged_cache_is_made_again(tmp_path_factory, make_tiny_corpus, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    corpus = open_corpus(folder if folder.exists() else make_tiny_corpus(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CACHED_FROM_BYTES", 0)
        fresh = corpus_segments(corpus, 64)
        [path] = caches(corpus)
        whole = path.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        cut, flipped = whole[:at], whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
        path.write_bytes(data.draw(st.sampled_from([cut, flipped, b"", b"0\n{}\n1234"])))
        assert equal(corpus_segments(corpus, 64), fresh) and path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_cached_at_home(own, scans, tmp_path, monkeypatch):
    def refuse(path):
        if path.parent == own.folder:
            raise PermissionError(13, "Permission denied")
        return written(path)

    written = module.atomic_path
    monkeypatch.setattr(module, "atomic_path", refuse)
    assert equal(corpus_segments(own, 64), corpus_segments(own, 64)) and len(scans) == 1
    assert not caches(own) and len(list((tmp_path / "cache").rglob("*.lengths"))) == 1
    monkeypatch.setattr(module, "write_cache", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert equal(corpus_segments(own, 32), scan_segments(own, 32))


def test_a_shard_written_during_the_scan_is_not_cached(own, monkeypatch):
    def scan(*args):
        table = scan_segments(*args)
        swap_two_tokens(own.paths[1])
        return table

    monkeypatch.setattr(module, "scan_segments", scan)
    corpus_segments(own, 64)
    assert not caches(own)


def digest_of(corpus) -> str:
    return corpus_segments(corpus, 64).digest()


def test_many_processes_may_start_at_once(own):
    with multiprocessing.get_context("fork").Pool(6) as pool:
        digests = set(pool.map(digest_of, [own] * 60, chunksize=1))
    assert digests == {scan_segments(own, 64).digest()} and len(list(own.folder.glob(".*"))) == 1


def test_small_corpora_leave_nothing_behind(make_tiny_corpus, tmp_path):
    corpus = open_corpus(make_tiny_corpus(tmp_path / "corpus"))
    before = sorted(corpus.folder.iterdir())
    corpus_segments(corpus, 64)
    assert sorted(corpus.folder.iterdir()) == before


# -- Rows of whole segments


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(12, 30))
def test_rows_hold_every_segment_in_order_and_end_only_when_the_next_does_not_fit(lengths, row_tokens):
    lengths = np.array(lengths, np.int32)
    bounds = packed_rows(lengths, row_tokens).tolist()
    assert bounds[0] == 0 and bounds[-1] == len(lengths)
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        assert first < last and lengths[first:last].sum() <= row_tokens
        assert last == len(lengths) or lengths[first : last + 1].sum() > row_tokens


def test_a_segment_longer_than_a_row_is_refused():
    with pytest.raises(InputError, match="a segment of 9 tokens does not fit a row of 8"):
        packed_rows(np.array([3, 9]), 8)
