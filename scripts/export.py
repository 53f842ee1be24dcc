"""An order as shards: the curriculum for trainers that know nothing of orders, in the stock `.bin` format.

    python -m scripts.export --order orders/fold5-0.npy --shards data/fineweb --out exported/fold5
    python -m scripts.export --order orders/fold5-0.npy --shards data/fineweb --out exported/bins --by-bin

The first writes ordered_train_000000.bin, ...: the inputs of every segment, end to end in training order. The second
deals the same segments to bin00/, bin01/, ... (lowest values of the measure first), each a whole corpus with its own
corpus.json, in training order within the bin. export.json says where it all came from.

**What a stock trainer sees.** One stream of tokens, in which a document starts with BOS. The exported tokens are
exactly the order's inputs, nothing added or dropped. So a segment that does not begin with BOS (a later piece of a long
document, or of one cut by a shard's end) is written as it is and looks to a stock trainer like the rest of whatever
stands before it, though it is not. `--bos` puts a BOS before each of these; either way they are counted and the count
is printed. And the last token of a segment is followed by the next segment's first, which is the true next token only
where both are BOS: at the end of a document. Shards are cut between segments, so no shard begins inside one.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curriculum.order import Order, check_segments, load_static_order, sorted_pool
from curriculum.score import read_scores
from data.cli import InputError, command
from data.files import atomic_folder, atomic_path, write_json
from data.segments import Segments, corpus_segments, packed_rows
from data.shards import Corpus, open_corpus, read_shard, write_corpus_json, write_shard
from data.tokenizer import of_corpus

EXPORT_VERSION = 1
BLOCK = 4096  # segments gathered at a time: how often the progress bar moves


def main(
    order: Path,
    out: Path,
    shards: str = "",
    by_bin: bool = False,
    shard_tokens: int = 100_000_000,
    bos: bool = False,
) -> None:
    """Write the segments of an order as token shards that any speedrun trainer reads.

    Args:
        order: order file (.npy) with its manifest beside it.
        out: folder to write; must not exist.
        shards: where the shards lie that the order was made for: a folder, a .bin file or a glob.
        by_bin: one folder of shards for each bin of the order, in place of one stream in training order.
        shard_tokens: tokens a shard holds at most; one shard is held in memory at a time (2 bytes a token).
        bos: put a BOS before every segment that does not begin with one.
    """
    if out.exists():
        raise InputError(f"{out}: already there; remove it or choose another --out")
    loaded = load_static_order(order)
    corpus = open_shards_of(loaded, shards)
    segments = corpus_segments(corpus, loaded.manifest["max_len"], loaded.manifest["unit"])
    check_segments(loaded, segments, order)
    longest = int(segments.length_N[loaded.ids_N].max()) + bos
    if not longest <= shard_tokens < 2**31:
        raise InputError(f"--shard-tokens {shard_tokens}: expected {longest} (the longest segment) to {2**31 - 1}")
    if "ranks" in corpus.tokenizer:
        of_corpus(corpus)  # refuses a rank file that is gone or was changed, before anything is written
    parts = parts_by_bin(loaded, segments) if by_bin else [Part(".", loaded.ids_N, {})]
    # Plain views of the memory maps: each slice of a memmap would carry its bookkeeping along.
    opened = [np.asarray(read_shard(path)) for path in corpus.paths]
    is_bare_N = begins_without_bos(opened, segments, corpus.bos_id)
    needs_bos_N = is_bare_N if bos else np.zeros_like(is_bare_N)
    source = f"{order.name}: order {loaded.manifest['order_sha256'][:12]} of {corpus.source}"

    with atomic_folder(out) as work, progress_bar(loaded.manifest["num_tokens"]) as bar:
        written = [
            write_part(work, part, corpus, opened, segments, needs_bos_N, shard_tokens, source, bar.update)
            for part in parts
        ]
        kept = ("order_sha256", "multiset_sha256", "measure", "schedule", "bins", "seed", "unit", "max_len", "shards")
        about = dict(
            version=EXPORT_VERSION,
            order=str(order),
            **{key: loaded.manifest[key] for key in kept},
            num_segments=len(loaded.ids_N),
            num_tokens=sum(part["num_tokens"] for part in written),
            segments_without_bos=int(np.count_nonzero(is_bare_N[loaded.ids_N])),
            bos_added=sum(part["bos_added"] for part in written),
            parts=written,
        )
        # The measure of whole work: every segment once, every token once, no more than the BOS that were asked for.
        assert sum(part["num_segments"] for part in written) == about["num_segments"]
        assert about["num_tokens"] == loaded.manifest["num_tokens"] + about["bos_added"]
        write_json(work / "export.json", about)
    summarise(out, about)


def open_shards_of(order: Order, shards: str) -> Corpus:
    """The corpus the order was made for. Raises InputError if it is not named or shards of it are missing."""
    names = [shard["name"] for shard in order.manifest["shards"]]
    if not shards:
        raise InputError(
            "--shards is missing: an order holds segment ids, not the place of its tokens; "
            f"name the folder that holds {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
        )
    corpus = open_corpus(shards)
    if missing := sorted(set(names) - {path.name for path in corpus.paths}):
        raise InputError(f"{shards}: {len(missing)} of the order's {len(names)} shards are missing: {missing[0]}, ...")
    return corpus


def begins_without_bos(opened: list[np.ndarray], segments: Segments, bos_id: int) -> np.ndarray:
    """Whether the first token of each segment is not BOS, bool (num_segments,). `opened` are the shards' tokens."""
    first_N = np.searchsorted(segments.shard_N, np.arange(len(opened) + 1))  # segments lie shard after shard
    spans = zip(opened, first_N[:-1], first_N[1:], strict=True)
    return np.concatenate([tokens[segments.start_N[low:high]] != bos_id for tokens, low, high in spans])


class Part(NamedTuple):
    """Segments that become one folder of shards."""

    folder: str  # within the export
    ids_N: np.ndarray  # in the order they are written
    about: dict


def parts_by_bin(order: Order, segments: Segments) -> list[Part]:
    """One part for each bin, lowest values first, in training order within a bin."""
    value_N, bin_N = values_and_bins(order)
    num_bins = order.manifest["bins"]
    digits = max(2, len(str(num_bins - 1)))
    parts = []
    for b in range(num_bins):
        inside = np.flatnonzero(bin_N == b)
        spread = dict(bin=b, lowest=float(value_N[inside].min()), highest=float(value_N[inside].max()))
        parts.append(Part(f"bin{b:0{digits}}", order.ids_N[inside], spread))
    return parts


def values_and_bins(order: Order) -> tuple[np.ndarray, np.ndarray]:
    """The measure, and the bin, of each segment of the order: both (num_segments,), in training order.

    Raises InputError if the scores are gone, are others, or give other bins than the order was made with.
    """
    folder = order.manifest["scores"]["folder"]
    try:
        pool = sorted_pool(order, read_scores(folder))
    except InputError as error:
        raise InputError(f"--by-bin: {folder}: {error}") from None
    at_N = np.searchsorted(pool.ids_P, order.ids_N)
    return pool.values_P[at_N], pool.bin_P[at_N]


def progress_bar(num_tokens: int):
    from tqdm import tqdm

    return tqdm(total=num_tokens, unit="tok", unit_scale=True, desc="exporting", disable=None)


def write_part(
    work: Path,
    part: Part,
    corpus: Corpus,
    opened: list[np.ndarray],
    segments: Segments,
    needs_bos_N: np.ndarray,
    shard_tokens: int,
    source: str,
    advance: Callable[[int], object],
) -> dict:
    """Write the shards of one part, the tokenizer's rank file and corpus.json; returns what export.json says of it."""
    folder, ids = work / part.folder, part.ids_N
    folder.mkdir(exist_ok=True)
    length = segments.length_N[ids] + needs_bos_N[ids]
    bounds = packed_rows(length, shard_tokens)
    for number, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        tokens_T = np.empty(int(length[first:last].sum(dtype=np.int64)), np.uint16)
        at = 0
        for low in range(first, last, BLOCK):
            block = ids[low : min(low + BLOCK, last)]
            pieces = slices(opened, segments, block, needs_bos_N[block], corpus.bos_id)
            end = at + sum(map(len, pieces))
            np.concatenate(pieces, out=tokens_T[at:end])
            advance(int(segments.length_N[block].sum()))
            at = end
        assert at == len(tokens_T)
        write_shard(folder / f"ordered_train_{number:06}.bin", tokens_T)
    if "ranks" in corpus.tokenizer:
        with atomic_path(folder / corpus.tokenizer["ranks"]) as temporary:
            shutil.copyfile(corpus.folder / corpus.tokenizer["ranks"], temporary)
    if "bin" in part.about:
        source = f"bin {part.about['bin']} of {source}"
    write_corpus_json(
        folder, tokenizer=corpus.tokenizer, vocab_size=corpus.vocab_size, bos_id=corpus.bos_id, source=source
    )
    return dict(
        folder=part.folder,
        **part.about,
        num_shards=len(bounds) - 1,
        num_segments=len(ids),
        num_tokens=sum(len(read_shard(path)) for path in open_corpus(folder).paths),  # what a reader finds
        bos_added=int(np.count_nonzero(needs_bos_N[ids])),
    )


def slices(
    opened: list[np.ndarray], segments: Segments, ids: np.ndarray, needs_bos: np.ndarray, bos_id: int
) -> list[np.ndarray]:
    """The inputs of segments, in the given order, as slices of their shards; a lone BOS before those that need one."""
    lone_bos = np.array([bos_id], np.uint16)
    pieces = []
    columns = (segments.shard_N[ids], segments.start_N[ids], segments.length_N[ids], needs_bos)
    for shard, start, length, bos in zip(*(column.tolist() for column in columns), strict=True):
        if bos:
            pieces.append(lone_bos)
        pieces.append(opened[shard][start : start + length])
    return pieces


def summarise(out: Path, about: dict) -> None:
    parts, bare = about["parts"], about["segments_without_bos"]
    by_bin = "bin" in parts[0]
    where = f"{len(parts)} folders by {about['measure']}" if by_bin else "training order"
    num_shards = sum(part["num_shards"] for part in parts)
    print(f"{out}: {about['num_segments']:,} segments, {about['num_tokens']:,} tokens, {where}; shards: {num_shards}")
    if by_bin:
        print(f"  {'folder':10}{'segments':>12}{'tokens':>16}   {about['measure']}")
        for part in parts:
            print(f"  {part['folder']:10}{part['num_segments']:12,}{part['num_tokens']:16,}", end="")
            print(f"   {part['lowest']:.4g} to {part['highest']:.4g}")
    done = (
        f"given one each, {about['bos_added']:,} tokens in all" if about["bos_added"] else "written as they are (--bos)"
    )
    print(f"  segments that begin without BOS: {bare:,} of {about['num_segments']:,}" + (f", {done}" if bare else ""))
    print(f"  for a stock trainer: {out}/{'bin*/' if by_bin else ''}ordered_train_*.bin")


if __name__ == "__main__":
    command(main)
