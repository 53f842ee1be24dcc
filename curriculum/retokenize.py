"""References with another tokenizer than the shards': decode to bytes, encode again, score, give back to segments.

What is comparable across tokenizers is `nll_per_byte` (nats per byte of the same text). Means per token are not: a
reference with longer tokens pays more for each and has fewer of them. Such a reference says so in its provenance
(`comparable`), and its table has two columns more:

    num_reference_tokens   predictions of the reference that fall in the segment (int32)
    num_unreadable_bytes   bytes of it that the reference could not read as they are: not UTF-8 (int32)

Which text, which context
    A document is re-encoded as a whole (one beyond LONGEST_TEXT in parts), then cut. So no token exists only because a
    segment ends there, none is lost and none is scored twice; the sums over segments are the sums over the text.
    (Segments encoded one by one would be simpler, and wrong at every edge: half words, half characters, and the space
    SentencePiece puts before each text.)
    The context of a prediction is the segment's own, as on the direct path: the segment's reference tokens, and the
    one before them. Scores then mean the same on both paths, and depend neither on units nor on who computes them.
    Where the reference's window is shorter than a segment, the segment is cut again in the same manner.

Which segment
    A reference token belongs to the segment that holds its first byte. (Tokenizers place tokens by character: a token
    that begins inside a character counts where the character begins.) Tokens tile the text: bytes that a tokenizer
    leaves out of its offsets belong to the token after them. A segment in which no token begins gets NaN; what its
    bytes cost was paid by the segment before.

Document ends
    The shards' BOS has no bytes. Where one begins a document the reference sees its own BOS; where one is a target
    the reference predicts its own EOS (for GPT-2's kind both are one token). A tokenizer that puts BOS before every
    text (Llama's, Gemma's) gets it before every segment too: its models never saw a text without.

Bytes that are not text
    A document cut by the shard's begin or end may lose part of a character there: it is left out. Invalid UTF-8
    elsewhere is shown to the reference as U+FFFD, one for each byte, so that places stay exact. Both are counted.

Shapes: N segments   R reference tokens of a stretch of text   P pieces: runs of at most a window of reference tokens
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from curriculum.measures import MODEL_MEASURES, model_measures
from data.cli import InputError
from data.segments import find_segments, packed_rows
from data.tokenizer import token_bytes

LONGEST_TEXT = 1 << 18  # shard tokens encoded at once: bounds memory where a document is longer than a book
BATCH_TOKENS = 1 << 18  # shard tokens given to the tokenizer at once, which spreads texts over all cores
PROBE = "Don't say 'naïve' 3.14159 times!\n\n\tif (x>=10):   return 日本語, Ελλάδα, \U0001f642\u200d\r\n  "


class Retokenizer(NamedTuple):
    """A reference's own tokenizer, and how its model wants text presented."""

    backend: object  # tokenizers.Tokenizer
    begin_id: int  # BOS: stands before a document
    end_id: int  # EOS: predicted where a document ends
    always_begin: bool  # the tokenizer puts BOS before every text, not only before documents
    window: int  # most tokens the model is given at once
    num_ids: int  # ids below this may be predicted; the head's other columns are padding

    def sha256(self) -> str:
        """Of everything here that changes which tokens a text becomes."""
        special = [self.begin_id, self.end_id, self.always_begin]
        return hashlib.sha256((self.backend.to_str() + json.dumps(special)).encode()).hexdigest()


class Stream(NamedTuple):
    """Reference tokens of a stretch of a shard, in order, with the document marks between them."""

    id_R: np.ndarray  # int64
    place_R: np.ndarray  # int64, the shard token that holds a token's first byte (of a mark: the BOS); never falls
    scored_R: np.ndarray  # bool; a BOS the reference only sees is not predicted
    unreadable: np.ndarray  # int64, the shard token of every byte the reference could not read


def open_retokenizer(name: str, tokenizer, window: int, num_rows: int) -> Retokenizer:
    """From a tokenizer of `transformers` and a model whose head has `num_rows` rows.

    Raises InputError if it gives no offsets (not a fast one) or has neither BOS nor EOS to mark documents with.
    """
    backend = fast_backend(tokenizer)
    if backend is None:
        raise InputError(
            f"{name}: its tokenizer differs from the shards' and is a slow one, which cannot tell where in the text "
            "its tokens lie: only tokenizers with a tokenizer.json (fast ones) can be used"
        )
    begin_id, end_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin_id, end_id = (end_id if begin_id is None else begin_id), (begin_id if end_id is None else end_id)
    if begin_id is None:
        raise InputError(f"{name}: its tokenizer has neither a BOS nor an EOS token: documents cannot be told apart")
    num_ids = min(num_rows, 1 + max(backend.get_vocab(with_added_tokens=True).values()))
    if max(begin_id, end_id) >= num_ids:
        raise InputError(f"{name}: its tokenizer's BOS or EOS id ({begin_id}, {end_id}) is beyond its {num_rows} ids")
    always_begin = backend.encode("").ids[:1] == [begin_id]
    if window < 1 + always_begin:
        raise InputError(f"{name}: sees {window} token at once: no room for any context")
    return Retokenizer(backend, begin_id, end_id, always_begin, window, num_ids)


def fast_backend(tokenizer):
    """The `tokenizers.Tokenizer` inside a tokenizer of `transformers`; None if it is a slow one or has no vocabulary.

    It is set to encode all of a text and nothing but the text: a saved truncation or padding is switched off, and
    "<|endoftext|>" written in a document is five words about tokenizers, not the end of the document.
    """
    if not getattr(tokenizer, "is_fast", False) or not tokenizer.backend_tokenizer.get_vocab_size(False):
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def encodes_alike(encoding, bos_id: int, tokenizer) -> bool:
    """Whether a tokenizer of `transformers` gives the shards' very ids: a mixed text, every entry of the vocabulary."""
    backend = fast_backend(tokenizer)
    if backend is None or bos_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return False
    entries = [piece.decode(errors="ignore") for piece in token_bytes(encoding)]
    probe = PROBE + "\n".join(entries)
    return backend.encode(probe, add_special_tokens=False).ids == encoding.encode_ordinary(probe)


def retokenized_measures(
    reference,
    tokens: np.ndarray,
    bos_id: int,
    pieces: Sequence[bytes],
    start_N: np.ndarray,
    length_N: np.ndarray,
    num_bytes_N: np.ndarray,
    row_tokens: int,
    advance: Callable[[int], object] = lambda num_tokens: None,
) -> dict[str, np.ndarray]:
    """Measures of consecutive segments of a shard by a reference that has a `retokenizer`; columns (N,).

    `tokens` is the whole shard: the documents at both ends of the run are encoded whole, whatever the run. `pieces`
    are the bytes of every id of the shards. `advance` is told of shard tokens done. The float32 MODEL_MEASURES are
    means over the reference's predictions that fall in the segment, `nll_per_byte` their sum over the segment's bytes.
    """
    retokenizer = reference.retokenizer
    begin, end = int(start_N[0]), int(start_N[-1]) + int(length_N[-1])  # targets are begin + 1 .. end
    stream = reference_stream(retokenizer, tokens, bos_id, pieces, begin, end)
    first_N = np.searchsorted(stream.place_R, start_N + 1)
    stop_N = np.searchsorted(stream.place_R, start_N + length_N, side="right")
    scored_before = np.concatenate([[0], np.cumsum(stream.scored_R)])
    count_N = scored_before[stop_N] - scored_before[first_N]
    moments = score_stream(reference, stream, first_N, stop_N, row_tokens, begin, end, advance)

    columns = {name: np.full(len(start_N), np.nan, np.float32) for name in MODEL_MEASURES}
    if (some_N := count_N > 0).any():
        for name, column in model_measures(*moments, count_N[some_N], num_bytes_N[some_N]).items():
            columns[name][some_N] = column
    unreadable = stream.unreadable[(stream.unreadable > begin) & (stream.unreadable <= end)]
    segment = np.searchsorted(start_N, unreadable - 1, side="right") - 1
    return columns | {
        "num_reference_tokens": count_N.astype(np.int32),
        "num_unreadable_bytes": np.bincount(segment, minlength=len(start_N)).astype(np.int32),
    }


def describe(columns: Mapping[str, np.ndarray]) -> str:
    """A sentence for the terminal on a table of retokenised scores: what is NaN, what was not text."""
    count_N, unreadable_N = columns["num_reference_tokens"], columns["num_unreadable_bytes"]
    empty = np.count_nonzero(np.isnan(columns["nll_per_byte"]) & (count_N > 0))
    return (
        f"{count_N.sum(dtype=np.int64):,} tokens of the reference's own tokenizer: compare nll_per_byte only; "
        f"{np.count_nonzero(count_N == 0):,} segments hold the begin of none and are NaN, {empty:,} have no text; "
        f"{unreadable_N.sum(dtype=np.int64):,} bytes in {np.count_nonzero(unreadable_N):,} segments are not UTF-8"
    )


def score_stream(reference, stream: Stream, first_N, stop_N, row_tokens: int, begin, end, advance) -> list[np.ndarray]:
    """NLL, entropy and varentropy of every scored token of stream[first:stop] of each segment, one after another.

    A segment is cut into pieces of at most a window. The piece with targets f .. g - 1 has inputs f - 1 .. g - 2; with
    `always_begin` BOS stands before these, and its prediction of token f - 1 is dropped.
    """
    use = reference.retokenizer
    most = use.window - use.always_begin
    pieces_N = -(-(stop_N - first_N) // most)
    piece_of_segment_P = np.arange(pieces_N.sum()) - np.repeat(np.cumsum(pieces_N) - pieces_N, pieces_N)
    from_P = np.repeat(first_N, pieces_N) + most * piece_of_segment_P
    to_P = np.minimum(from_P + most, np.repeat(stop_N, pieces_N))
    prefix_P = use.always_begin & (stream.id_R[from_P - 1] != use.begin_id)
    length_P = to_P - from_P + prefix_P

    found: list = [[np.empty(0, np.float32)] for _ in range(3)]
    told = begin
    rows = packed_rows(length_P, max(row_tokens, use.window))
    for a, b in zip(rows[:-1], rows[1:], strict=True):
        bounds = np.concatenate([[0], np.cumsum(length_P[a:b])]).astype(np.int32)
        local_T = np.arange(bounds[-1]) - np.repeat(bounds[:-1], length_P[a:b])
        target_T = np.repeat(from_P[a:b] - prefix_P[a:b], length_P[a:b]) + local_T
        added_T = (local_T == 0) & np.repeat(prefix_P[a:b], length_P[a:b])
        input_ids = np.where(added_T, use.begin_id, stream.id_R[target_T - 1])
        scored_T = stream.scored_R[target_T] & ~added_T
        for column, values in zip(found, reference.moments(input_ids, stream.id_R[target_T], bounds), strict=True):
            column.append(values.numpy()[scored_T])
        done = min(int(stream.place_R[target_T[-1]]), end)
        advance(done - told)
        told = done
    advance(end - told)
    return [np.concatenate(column) for column in found]


def reference_stream(retokenizer: Retokenizer, tokens, bos_id: int, pieces: Sequence[bytes], begin, end) -> Stream:
    """The reference's tokens of all texts that touch tokens[begin : end + 1], and a BOS in front of them all.

    (That first BOS is the context where there is no other: at a shard's begin, inside a document, where the first
    character was left out.)
    """
    size_V = np.array([len(piece) for piece in pieces], np.int64)
    start = find_texts(tokens, bos_id, pieces)
    stop = np.append(start[1:], len(tokens))
    chosen = slice(int(np.searchsorted(start, begin, "right")) - 1, int(np.searchsorted(start, end, "right")))
    marks = [(retokenizer.end_id, True)]
    if retokenizer.begin_id != retokenizer.end_id:
        marks.append((retokenizer.begin_id, False))

    ids, places, scored, unreadable = [[retokenizer.begin_id]], [[-1]], [[False]], [np.empty(0, np.int64)]
    spans = list(zip(start[chosen].tolist(), stop[chosen].tolist(), strict=True))
    for batch in batches(spans, BATCH_TOKENS):
        texts = []
        for low, high in batch:
            raw = b"".join([pieces[t] for t in tokens[low:high].tolist()])
            cut = (low == 0 and tokens[0] != bos_id, high == len(tokens))
            texts.append(readable(raw, *cut))
        encoded = retokenizer.backend.encode_batch([text for text, _, _ in texts], add_special_tokens=False)
        for (low, high), (_, byte_C, bad), encoding in zip(batch, texts, encoded, strict=True):
            # Byte b lies in the first token whose bytes end behind it; BOS, which has none, is passed over.
            end_of_token = np.cumsum(size_V[tokens[low:high]])
            if tokens[low] == bos_id:
                ids.append([i for i, _ in marks])
                places.append([low] * len(marks))
                scored.append([s for _, s in marks])
            first = byte_C[first_characters(encoding.offsets)]
            ids.append(np.array(encoding.ids, np.int64))
            places.append(np.minimum(low + np.searchsorted(end_of_token, first, "right"), high - 1))
            scored.append(np.ones(len(first), bool))
            unreadable.append(low + np.searchsorted(end_of_token, bad, "right"))
    id_R = np.concatenate(ids).astype(np.int64)
    if int(id_R.max()) >= retokenizer.num_ids:
        raise InputError(f"the reference's tokenizer gives id {id_R.max()}, its model has {retokenizer.num_ids}")
    return Stream(id_R, np.concatenate(places).astype(np.int64), np.concatenate(scored), np.concatenate(unreadable))


def batches(spans: list[tuple[int, int]], most: int) -> list[list[tuple[int, int]]]:
    """Consecutive spans (low, high) in groups that begin at most `most` tokens apart; empty spans are left out."""
    groups: dict[int, list] = {}
    for low, high in spans:
        if high > low:
            groups.setdefault((low - spans[0][0]) // most, []).append((low, high))
    return list(groups.values())


def find_texts(tokens: np.ndarray, bos_id: int, pieces: Sequence[bytes]) -> np.ndarray:
    """Where each text to encode begins in a shard, int64: at its documents, and within a very long one every so often.

    A function of the shard alone. A cut within a document waits for a token that begins a character.
    """
    start, _ = find_segments(tokens, bos_id, LONGEST_TEXT)
    if tokens[-1] == bos_id:  # a target, so no segment begins with it
        start = np.append(start, len(tokens) - 1)
    stop = np.append(start[1:], len(tokens))
    for i in np.flatnonzero((tokens[start] != bos_id) & (start > 0)):
        while start[i] < stop[i] and is_continuation(pieces[tokens[start[i]]][:1]):
            start[i] += 1
    return start


def is_continuation(byte: bytes) -> bool:
    """Whether a byte (or none) continues a UTF-8 character."""
    return b"\x80" <= byte < b"\xc0"


def readable(raw: bytes, cut_begin: bool, cut_end: bool) -> tuple[str, np.ndarray, np.ndarray]:
    """Bytes as text: the text, the byte where each of its characters begins (and one more), the unreadable bytes.

    A character cut at an end that was cut is left out; any other byte that is not UTF-8 becomes U+FFFD.

    >>> readable(b"\\xa9 a\\xff\\xc3", True, True)
    (' a\ufffd', array([1, 2, 3, 4]), array([0, 3, 4]))
    """
    low, high = 0, len(raw)
    while cut_begin and low < min(3, high) and is_continuation(raw[low : low + 1]):
        low += 1
    if cut_end:
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        decoder.decode(raw[max(low, high - 3) : high])
        high -= len(decoder.getstate()[0])  # what it would need more bytes to read
    # surrogateescape turns each invalid byte into one code point of its own, which no valid text holds.
    text = raw[low:high].decode("utf-8", "surrogateescape")
    code_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    invalid_C = (code_C >= 0xDC80) & (code_C <= 0xDCFF)
    size_C = 1 + sum((code_C >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
    size_C[invalid_C] = 1
    byte_C = np.concatenate([[low], low + np.cumsum(size_C)])
    assert byte_C[-1] == high
    if invalid_C.any():
        text = np.where(invalid_C, 0xFFFD, code_C).astype("<u4").tobytes().decode("utf-32-le")
    return text, byte_C, np.concatenate([np.arange(low), byte_C[:-1][invalid_C], np.arange(high, len(raw))])


def first_characters(offsets: list[tuple[int, int]]) -> np.ndarray:
    """The character where each token begins, int64, such that tokens tile the text.

    Some tokenizers trim spaces off their offsets. A token begins where the tokens before it end, or earlier (inside
    the same character).

    >>> first_characters([(0, 5), (6, 11), (12, 12), (12, 13), (12, 13)]).tolist()
    [0, 5, 11, 12, 12]
    """
    begin, end = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    covered = np.maximum.accumulate(np.concatenate([[0], end]))[: len(begin)]
    return np.minimum.accumulate(np.minimum(begin, covered)[::-1])[::-1]
