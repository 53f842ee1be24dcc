"""Segments: the pieces of a corpus that are scored, sorted and trained on.

A segment is a BOS-aligned piece of one document of at most `max_len` tokens; a longer document gives several,
the last one shorter. With `unit="window"` documents are ignored and the pieces are fixed windows. Either way
segments tile the tokens of a shard, in order, without gap or overlap:

    inputs  = shard[start : start + length]
    targets = shard[start + 1 : start + length + 1]      the true next token always

so the very last token of a shard, which has no target, belongs to no segment, and
sum(length) = sum over shards of (num_tokens - 1). A document cut by a shard's end is two segments.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from data.cli import InputError
from data.shards import Corpus, check_vocab, fingerprint, read_shard

UNITS = ("document", "window")


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
