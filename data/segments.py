"""Segments: the pieces of a corpus that are scored, sorted and trained on.

A segment is a BOS-aligned piece of one document of at most `max_len` tokens; a longer document gives several,
the last one shorter. With `unit="window"` documents are ignored and the pieces are fixed windows. Either way
segments tile the tokens of a shard, in order, without gap or overlap:

    inputs  = shard[start : start + length]
    targets = shard[start + 1 : start + length + 1]      the true next token always

so the very last token of a shard, which has no target, belongs to no segment, and
sum(length) = sum over shards of (num_tokens - 1). A document cut by a shard's end is two segments.

A scan reads every token. For large corpora its result is kept beside the shards (or in ~/.cache) as a file of lengths:
segments tile, so their lengths say everything. The file names the shards it was made from and carries its own
checksum; if anything differs it is made again.
"""

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.cli import InputError
from data.files import atomic_path, digest
from data.shards import Corpus, check_vocab, fingerprint, read_shard

UNITS = ("document", "window")
CACHE_VERSION = 1
CACHED_FROM_BYTES = 32 << 20  # smaller corpora are scanned as fast as a cache is read


@dataclass(frozen=True)
class Segments:
    """N segments of a corpus; a segment's id is its row."""

    shard_N: np.ndarray  # int32, index into Corpus.paths
    start_N: np.ndarray  # int64, first token within the shard
    length_N: np.ndarray  # int32, number of predictions
    fingerprints: tuple[str, ...] = ()  # of the shards: places alone do not tell corpora apart

    def __len__(self) -> int:
        return len(self.length_N)

    @property
    def num_tokens(self) -> int:
        """Predictions in all segments together."""
        return int(self.length_N.sum(dtype=np.int64))

    def digest(self) -> str:
        """Hex SHA-256 of the table: equal digests mean that segment ids mean the same texts."""
        return self._digest

    @cached_property
    def _digest(self) -> str:  # half a second for 10M segments, and asked for more than once
        sha = hashlib.sha256("".join(self.fingerprints).encode())
        for column, dtype in ((self.shard_N, "<i4"), (self.start_N, "<i8"), (self.length_N, "<i4")):
            sha.update(np.ascontiguousarray(column, dtype=dtype).data)
        return sha.hexdigest()


def find_segments(tokens: np.ndarray, bos_id: int, max_len: int, unit: str = "document"):
    """Segments of one shard: start (int64) and length (int32), each (num_segments,).

    >>> start, length = find_segments(np.array([0, 5, 5, 0, 5, 5, 5, 5], np.uint16), bos_id=0, max_len=3)
    >>> start.tolist(), length.tolist()
    ([0, 3, 6], [3, 3, 1])

    A shard of a single token has no prediction and gives no segment.
    Raises InputError on an unknown unit or max_len < 1.
    """
    if unit not in UNITS:
        raise InputError(f"unit {unit!r}: expected one of {', '.join(UNITS)}")
    if max_len < 1:
        raise InputError(f"max_len {max_len}: a segment needs at least 1 token")
    num_predictions = len(tokens) - 1
    if num_predictions < 1:
        return np.empty(0, np.int64), np.empty(0, np.int32)
    document_start = np.zeros(1, np.int64)
    if unit == "document":
        bos = np.flatnonzero(tokens[:num_predictions] == np.uint16(bos_id))
        # A shard may begin inside a document (stock FineWeb cuts them): its head is a piece of its own.
        document_start = bos if len(bos) and bos[0] == 0 else np.concatenate([document_start, bos])
    document_len = np.diff(document_start, append=num_predictions)
    pieces = -(-document_len // max_len)
    piece_of_document = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = np.repeat(document_start, pieces) + piece_of_document * max_len
    length = np.diff(start, append=num_predictions)
    assert length.sum() == num_predictions and length.min() >= 1 and length.max() <= max_len
    return start, length.astype(np.int32)


def corpus_segments(corpus: Corpus, max_len: int, unit: str = "document") -> Segments:
    """Segments of every shard of `corpus`, in order. Token ids are checked against the vocabulary.

    Raises InputError if the corpus has no prediction at all.
    """
    if sum(path.stat().st_size for path in corpus.paths) < CACHED_FROM_BYTES:
        return scan_segments(corpus, max_len, unit)
    key = cache_key(corpus, max_len, unit)
    places = cache_paths(corpus, max_len, unit)
    for path in places:
        if (found := read_cache(path, key)) is not None:
            return found
    segments = scan_segments(corpus, max_len, unit)
    if cache_key(corpus, max_len, unit) == key:  # else a shard was written meanwhile
        for path in places:
            try:
                write_cache(path, key, segments)
                break
            except OSError:  # not writable, or full: the next place, or none
                continue
    return segments


def scan_segments(corpus: Corpus, max_len: int, unit: str = "document") -> Segments:
    """`corpus_segments`, from the tokens themselves."""
    tables = []
    for path in corpus.paths:
        tokens = read_shard(path)
        check_vocab(path, tokens, corpus.vocab_size)
        tables.append(find_segments(tokens, corpus.bos_id, max_len, unit))
    counts = [len(start) for start, _ in tables]
    if sum(counts) == 0:
        raise InputError(f"{corpus.folder}: the corpus is empty: {len(tables)} shards hold no token with a target")
    return Segments(
        np.repeat(np.arange(len(tables), dtype=np.int32), counts),
        np.concatenate([start for start, _ in tables]),
        np.concatenate([length for _, length in tables]),
        tuple(fingerprint(path) for path in corpus.paths),
    )


def cache_key(corpus: Corpus, max_len: int, unit: str) -> dict:
    """Everything a table of segments depends on; of a shard its size, time of change and a sample of its content."""
    shards = []
    for path in corpus.paths:
        about = path.stat()
        shards.append([path.name, about.st_size, about.st_mtime_ns, fingerprint(path)])
    return dict(
        version=CACHE_VERSION,
        max_len=max_len,
        unit=unit,
        bos_id=corpus.bos_id,
        vocab_size=corpus.vocab_size,
        shards=shards,
    )


def cache_paths(corpus: Corpus, max_len: int, unit: str) -> list[Path]:
    """Where the cache may lie, best place first. Named by the shards' names: new content takes the old one's place."""
    names = [path.name for path in corpus.paths]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "entropy-curriculum"
    name = f"{unit}-{max_len}-{digest(names)}.lengths"
    return [corpus.folder / f".segments-{name}", home / f"segments-{digest(str(corpus.folder.resolve()))}-{name}"]


def write_cache(path: Path, key: dict, segments: Segments) -> None:
    """A checksum of the rest, a line of JSON, and the lengths (int32). Whoever writes last wins: all write the same."""
    counts = np.bincount(segments.shard_N, minlength=len(key["shards"])).tolist()
    about = json.dumps(dict(key=key, counts=counts, digest=segments.digest())).encode() + b"\n"
    lengths = np.ascontiguousarray(segments.length_N, "<i4").data
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(checksum(about, lengths) + b"\n" + about)
        file.write(lengths)


def read_cache(path: Path, key: dict) -> Segments | None:
    """The table kept at `path`; None if there is none, it is damaged, or it was made of anything else than `key`."""
    try:
        with open(path, "rb") as file:
            found, about = file.readline(200).strip(), file.readline()
            length_N = np.fromfile(file, "<i4")
    except OSError:
        return None
    if found != checksum(about, length_N.data) or (told := json.loads(about))["key"] != key:
        return None
    start_N, first = np.empty(len(length_N), np.int64), 0
    for count in told["counts"]:
        length = length_N[first : first + count]
        start_N[first : first + count] = np.cumsum(length, dtype=np.int64) - length
        first += count
    shard_N = np.repeat(np.arange(len(told["counts"]), dtype=np.int32), told["counts"])
    segments = Segments(shard_N, start_N, length_N, tuple(shard[-1] for shard in key["shards"]))
    segments.__dict__["_digest"] = told["digest"]  # covered by the checksum
    return segments


def checksum(about: bytes, lengths: memoryview) -> bytes:
    """Guards against damage, not forgery: a SHA-256 would take longer than all the rest of reading."""
    return b"%08x" % zlib.crc32(lengths, zlib.crc32(about))


def packed_rows(length_N: np.ndarray, row_tokens: int) -> np.ndarray:
    """Pack whole segments, in order, into rows of at most `row_tokens`: (num_rows + 1,) boundaries.

    Row r holds segments bounds[r]:bounds[r+1]. Next-fit keeps the order (a row's content is a function of the
    table alone, so scores do not depend on who computes them); with segments much shorter than a row it wastes little.

    >>> packed_rows(np.array([3, 3, 2, 8, 1]), 8).tolist()
    [0, 3, 4, 5]
    """
    if len(length_N) and int(length_N.max()) > row_tokens:
        raise InputError(
            f"a segment of {int(length_N.max())} tokens does not fit a row of {row_tokens}: raise the row size"
        )
    end_N = np.cumsum(length_N, dtype=np.int64)
    bounds = [0]
    while bounds[-1] < len(length_N):
        used = end_N[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(end_N, used + row_tokens, side="right")))
    return np.array(bounds)
