"""Any text to token shards: JSON lines, text files, Parquet, or a Hugging Face dataset.

    python -m data.prepare corpus.jsonl.xz --out data/english --reference-fraction 0.3
    python -m data.prepare books/ hf:HuggingFaceFW/fineweb:sample-10BT --out data/mixed --tokenizer my.tiktoken

    sources -> batches of rows -> text, split, tokens (all cores) -> in order, one part file a split -> shards

A document's split follows from a hash of its text: the same text is never in two splits, and a larger fraction
only adds documents to a split. Shards are cut between documents; only a document longer
than a shard goes on in the next one.

Everything is built in the folder `.NAME.prepare` beside --out, which becomes --out by one rename at the very
end: --out is whole or it is not there. `prepare.json` in it says which job it is and how far; it is rewritten
after each finished shard, and from there the same command continues after a kill, to the same bytes.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.cli import InputError, command
from data.files import digest, read_json, sync_folder, write_json
from data.shards import write_corpus_json, write_shard
from data.sources import MAX_DOCUMENT_BYTES, Batch, Source, find_sources, read_batches
from data.tokenizer import BOS, by_name

JOB_VERSION = 1  # raise it when the same options come to mean other bytes
SPLITS = ("train", "val", "reference")
BATCHES_AHEAD = 4  # per worker, read but not yet written: bounds the memory

GROUP_CHARACTERS = 1 << 16  # documents are joined to about this size before tiktoken is called
# tiktoken 0.14 panics on 999,999 white-space characters with a word after them (its regex engine's stack limit).
PANIC_CHARACTERS = 900_000
# Rust's `\s`, which is not Python's: U+001C to U+001F are missing here.
LONG_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{10000,}")

NOT_UNICODE, NOT_JSON, NO_FIELD = "not valid Unicode", "not JSON", "no such field"
NOT_TEXT, EMPTY, TOO_LONG = "field is not text", "empty", f"over {MAX_DOCUMENT_BYTES >> 20} MiB"


def main(
    sources: tuple[str, ...],
    /,
    *,
    out: Path,
    tokenizer: str = "gpt2",
    field: str = "text",
    name: str | None = None,
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.01,
    reference_fraction: float = 0.0,
    max_tokens: int | None = None,
    workers: int = 0,
) -> None:
    """Tokenise text into shards for train, val and (if asked) reference, with the corpus.json that describes them.

    Args:
        sources: files (.jsonl, .parquet, .txt, .md, ...; also .gz, .xz, .zst), folders of such files, or Hugging
            Face datasets: org/name, or hf:NAME[@REVISION][:CONFIG[:SPLIT]] (SPLIT is train unless given). A text
            file is one document. Read in the order given, folders in the order of their file names.
        out: folder to make. It appears when everything is done; until then the work lies in .NAME.prepare beside it.
        tokenizer: gpt2, or the path of a rank file (tiktoken's `base64 rank` lines), which is copied beside the shards.
        field: name of the JSON key or column that holds the text.
        name: first part of the shards' file names; None means the name of --out.
        shard_tokens: tokens a shard holds at most.
        val_fraction: share of the documents dealt to the val split (0 to 1).
        reference_fraction: share of the documents dealt to the reference split, the text that a reference model may
            learn from so that it never scores what it has seen (0 to 1).
        max_tokens: stop before the first document that would bring all splits together above this many tokens;
            None means no limit.
        workers: processes that tokenise; 0 means one per available core.
    """
    started = time.perf_counter()
    out = out.resolve()
    name = name if name is not None else out.name
    check_options(out, name, shard_tokens, val_fraction, reference_fraction, max_tokens, workers)
    found = find_sources(sources)
    encoding, about = by_name(tokenizer)
    if encoding.n_vocab > 65_536:
        raise InputError(f"{tokenizer}: {encoding.n_vocab} ids, but a shard's uint16 tokens hold at most 65536")
    job = {
        "version": JOB_VERSION,
        "sources": list(sources),
        "source_digest": digest([[source.name, source.version] for source in found]),
        "tokenizer": about,
        "field": field,
        "name": name,
        "shard_tokens": shard_tokens,
        "val_fraction": val_fraction,
        "reference_fraction": reference_fraction,
        "max_tokens": max_tokens,
    }
    if is_done(out, job):
        print(f"{out}: already done, by the same command; nothing to do")
        return
    work = out.with_name(f".{out.name}.prepare")
    with sole_writer(work):
        progress = resume_or_start(work, job, tokenizer, encoding)
        tokens_before = total_tokens(progress)
        tokenise(work, job, progress, found, workers or available_cores())
        refuse_if_nothing(work, progress)
        print_summary(job, progress, time.perf_counter() - started, total_tokens(progress) - tokens_before)
        corpus = describe(work, job, encoding)
        publish(work, out)
    print(f"corpus {digest(corpus['shards'])} in {out}")


def check_options(
    out: Path,
    name: str,
    shard_tokens: int,
    val_fraction: float,
    reference_fraction: float,
    max_tokens: int | None,
    workers: int,
) -> None:
    """Raise InputError for a value no job can have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"--name {name!r}: expected letters, digits, dot, dash or underscore; give another --name")
    if any(f"_{split}_" in f"_{name}_" for split in SPLITS):
        raise InputError(f"--name {name!r}: {', '.join(SPLITS)} are the names of splits; give another --name")
    if not 1 <= shard_tokens < 2**31:
        raise InputError(f"--shard-tokens {shard_tokens}: expected 1 to 2147483647, what a shard's header can count")
    for option, share in (("val", val_fraction), ("reference", reference_fraction)):
        if not 0 <= share < 1:
            raise InputError(f"--{option}-fraction {share}: expected a share of the documents, 0 up to but not 1")
    if val_fraction + reference_fraction >= 1:
        raise InputError(
            f"--val-fraction {val_fraction} and --reference-fraction {reference_fraction} leave nothing to train on: "
            "their sum must be below 1"
        )
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"--max-tokens {max_tokens}: expected at least 1")
    if workers < 0:
        raise InputError(f"--workers {workers}: expected a number of processes, or 0 for all cores")
    if os.path.ismount(out):
        raise InputError(f"{out}: a mount point cannot be put in place by one rename; name a folder below it")


# ---------------------------------------------------------------- the work of one core: rows to tokens


class Encoded(NamedTuple):
    """The D good documents of a batch, in order."""

    tokens: np.ndarray  # uint16, each document's BOS and tokens
    length_D: np.ndarray  # int64, BOS included
    split_D: np.ndarray  # int8, index into SPLITS
    bad: Counter  # rows left out, by kind


def encode_rows(rows: bytes | list, *, tokenizer: str, field: str, val: float, reference: float) -> Encoded:
    """Texts, splits and tokens of a batch: a pure function of its arguments, so any process may compute it."""
    if isinstance(rows, bytes):
        rows = rows.removesuffix(b"\n").split(b"\n")
    texts, splits, bad = [], [], Counter()
    for row in rows:
        text, why_bad = text_of(row, field)
        if why_bad:
            bad[why_bad] += 1
        else:
            texts.append(text)
            splits.append(split_of(text, val, reference))
    encoding = cached_encoding(tokenizer)
    tokens = encode_documents(texts, encoding)
    length_D = np.diff(np.flatnonzero(tokens == encoding.eot_token), append=len(tokens))
    assert len(length_D) == len(texts), "only the BOS we put there may be in the tokens"
    return Encoded(tokens, length_D, np.array(splits, np.int8), bad)


def text_of(row: bytes | dict, field: str) -> tuple[str, str]:
    """(text, "") of a row, a JSON line or a dict; ("", why) if it has none that can be used."""
    if isinstance(row, bytes):
        if not row.strip():
            return "", EMPTY
        try:
            row = json.loads(row)
        except UnicodeDecodeError:
            return "", NOT_UNICODE
        except (ValueError, RecursionError):  # nested beyond Python's depth
            return "", NOT_JSON
    if not isinstance(row, dict) or field not in row:
        return "", NO_FIELD
    text = row[field]
    if not isinstance(text, str | bytes):
        return "", NOT_TEXT
    if len(text) > MAX_DOCUMENT_BYTES:
        return "", TOO_LONG
    try:
        if isinstance(text, bytes):
            text = text.decode()
        elif not text.isascii():
            text.encode()  # half of a surrogate pair, which JSON can spell, is no character
    except UnicodeError:
        return "", NOT_UNICODE
    return ("", EMPTY) if not text or text.isspace() else (text, "")


def split_of(text: str, val: float, reference: float) -> int:
    """Index into SPLITS, by a hash of the text: val from its lower end, reference from its upper end.

    >>> [SPLITS[split_of(text, 0.2, 0.3)] for text in ("one", "two", "three", "two")]
    ['train', 'reference', 'val', 'reference']
    """
    position = (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 11) / 2**53
    if position < val:
        return SPLITS.index("val")
    return SPLITS.index("reference" if position >= 1 - reference else "train")


@functools.lru_cache(maxsize=1)
def cached_encoding(tokenizer: str):
    return by_name(tokenizer)[0]


def encode_documents(texts: list[str], encoding) -> np.ndarray:
    """The tokens of all documents, each with BOS in front: (num_tokens,) uint16, and exactly those of
    `encoding.encode_ordinary`. Raises UnicodeEncodeError if a text holds half of a surrogate pair.
    """
    parts, group, num_characters = [np.empty(0, np.uint16)], [], 0
    for text in texts:
        group.append(text)
        num_characters += len(text)
        if num_characters >= GROUP_CHARACTERS:
            parts.append(encode_group(group, encoding))
            group, num_characters = [], 0
    if group:
        parts.append(encode_group(group, encoding))
    return np.concatenate(parts)


def encode_group(texts: list[str], encoding) -> np.ndarray:
    """`encode_documents` in one call of tiktoken where that is possible.

    tiktoken cuts a text at special tokens before anything else, so documents joined by BOS are encoded as if each
    were alone. One call for many, with no Python list in between, takes two thirds of the time of one call for each.
    """
    joined = BOS + BOS.join(texts)
    if len(joined) < PANIC_CHARACTERS and joined.count(BOS) == len(texts):
        return encoding.encode_to_numpy(joined, allowed_special={BOS}, disallowed_special=()).astype(np.uint16)
    parts = []
    for text in texts:  # one spells out `<|endoftext|>`, which is ordinary text there, or is very long
        parts.append(np.array([encoding.eot_token], np.uint16))
        for piece in cut_long_space(text):
            parts.append(encoding.encode_to_numpy(piece, disallowed_special=()).astype(np.uint16))
    return np.concatenate(parts)


def cut_long_space(text: str) -> Iterator[str]:
    """Pieces of `text` that encode as the whole does, and on which tiktoken does not panic.

    GPT-2's pattern ends a run of white space before its last character if a word follows; so does a cut there.
    """
    start = 0
    for run in LONG_SPACE.finditer(text):
        if run.end() < len(text):
            yield text[start : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


# ---------------------------------------------------------------- all cores, in order, into part files


def tokenise(work: Path, job: dict, progress: dict, sources: list[Source], workers: int) -> None:
    """Read, encode and write everything that `progress` says is missing, then close the last shards."""
    writers = [
        SplitWriter(work / f"{job['name']}_{split}", job["shard_tokens"], progress["splits"][split]) for split in SPLITS
    ]
    ranks = job["tokenizer"].get("ranks")
    encode = functools.partial(
        encode_rows,
        tokenizer=str(work / ranks) if ranks else job["tokenizer"]["name"],
        field=job["field"],
        val=job["val_fraction"],
        reference=job["reference_fraction"],
    )
    batches = read_batches(sources, job["field"], progress["source"], progress["batch"])
    with progress_bar(sources) as bar, closing(in_parallel(encode, batches, workers)) as results:
        for batch, encoded in results:
            num_shards = total_shards(progress)
            encoded, is_full = up_to(encoded, job["max_tokens"], total_tokens(progress))
            append(writers, encoded)
            progress["bad"] = dict(Counter(progress["bad"]) + encoded.bad)
            progress["source"], progress["batch"] = batch.source, batch.batch
            show(bar, sources, batch, progress)
            if is_full:
                break
            if total_shards(progress) > num_shards:
                save(work, job, progress, writers)
    for writer in writers:
        writer.finish_shard()
    progress["source"], progress["batch"] = len(sources), 0
    save(work, job, progress, writers)


def up_to(encoded: Encoded, max_tokens: int | None, tokens_before: int) -> tuple[Encoded, bool]:
    """The documents that still fit under `max_tokens`, and whether one did not."""
    if max_tokens is None:
        return encoded, False
    end_D = np.cumsum(encoded.length_D)
    num_fitting = int(np.searchsorted(end_D, max_tokens - tokens_before, side="right"))
    if num_fitting == len(end_D):
        return encoded, False
    num_tokens = int(end_D[num_fitting - 1]) if num_fitting else 0
    tokens, length_D, split_D = encoded.tokens[:num_tokens], encoded.length_D[:num_fitting], encoded.split_D
    return Encoded(tokens, length_D, split_D[:num_fitting], encoded.bad), True


def append(writers: list["SplitWriter"], encoded: Encoded) -> None:
    """Deal the documents of a batch to the writers of their splits."""
    for index, writer in enumerate(writers):
        is_ours_D = encoded.split_D == index
        if is_ours_D.any():
            writer.append(encoded.tokens[np.repeat(is_ours_D, encoded.length_D)], encoded.length_D[is_ours_D])


def in_parallel(function: Callable, batches: Iterator[Batch], workers: int) -> Iterator[tuple[Batch, Encoded]]:
    """(batch without its rows, function(its rows)) for every batch, in order, with few of them in memory.

    Processes, not threads: parsing JSON holds the GIL, and two threads reached 1.5 times the speed of one, two
    processes 1.8 times.
    """
    if workers == 1:
        for batch in batches:
            yield batch._replace(rows=None), function(batch.rows)
        return
    waiting: deque = deque()
    # spawn: a forked child would share the locks of Arrow's and the Hub client's threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=live_with_parent)
    try:
        for batch in batches:
            waiting.append((batch._replace(rows=None), pool.submit(function, batch.rows)))
            if len(waiting) == BATCHES_AHEAD * workers:
                place, future = waiting.popleft()
                yield place, future.result()
        while waiting:
            place, future = waiting.popleft()
            yield place, future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, most likely for want of memory; run the same command with fewer --workers "
            "to continue from the last finished shard"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def live_with_parent() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: after kill -9 a worker would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def available_cores() -> int:
    """Cores this process may use: in a container or under taskset fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SplitWriter:
    """One split while it is written: finished shards, and a part file with the tokens of the next one.

    `counts` is the split's entry in `prepare.json`, kept up to date here: documents, tokens, finished shards and
    how many tokens are pending in the part file. On disk the part file may be ahead of a saved `counts`: what lies
    beyond is cut off when the job is continued.
    """

    def __init__(self, prefix: Path, shard_tokens: int, counts: dict):
        self.prefix, self.shard_tokens, self.counts = prefix, shard_tokens, counts
        self.part: BinaryIO | None = None

    def part_path(self) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}_{self.counts['shards']:06d}.part")

    def append(self, tokens: np.ndarray, length_D: np.ndarray) -> None:
        """Add documents, finishing a shard before each one that would not fit into it any more."""
        end_P = np.cumsum(cut_lengths(length_D, self.shard_tokens))
        num_written = 0
        while num_written < len(tokens):
            room = self.shard_tokens - self.counts["pending"]
            num_fitting = int(np.searchsorted(end_P, num_written + room, side="right"))
            end = int(end_P[num_fitting - 1]) if num_fitting else 0
            if end > num_written:
                self.write(tokens[num_written:end])
                num_written = end
            if num_written < len(tokens):
                self.finish_shard()
        self.counts["documents"] += len(length_D)
        self.counts["tokens"] += len(tokens)

    def write(self, tokens: np.ndarray) -> None:
        if self.part is None:
            self.part = open_part(self.part_path(), self.counts["pending"])
        self.part.write(np.ascontiguousarray(tokens, "<u2").data)
        self.counts["pending"] += len(tokens)

    def finish_shard(self) -> None:
        """Turn the part file into a shard. The part stays until `drop_old_parts`: a kill may come before `save`."""
        if not self.counts["pending"]:
            return
        path = self.part_path()
        self.sync()
        tokens = np.memmap(path, "<u2", "r", shape=(self.counts["pending"],))
        write_shard(self.prefix.with_name(f"{self.prefix.name}_{self.counts['shards']:06d}.bin"), tokens)
        if self.part is not None:
            self.part.close()
            self.part = None
        self.counts["shards"] += 1
        self.counts["pending"] = 0

    def sync(self) -> None:
        if self.part is not None:
            self.part.flush()
            os.fsync(self.part.fileno())

    def drop_old_parts(self) -> None:
        for path in self.prefix.parent.glob(f"{self.prefix.name}_*.part"):
            if path != self.part_path() or not self.counts["pending"]:
                path.unlink()


def open_part(path: Path, num_tokens: int) -> BinaryIO:
    """Open a part file to append after its first `num_tokens` tokens."""
    if num_tokens == 0:
        return open(path, "wb")
    file = open(path, "r+b")
    file.truncate(2 * num_tokens)
    file.seek(0, os.SEEK_END)
    return file


def cut_lengths(length_D: np.ndarray, shard_tokens: int) -> np.ndarray:
    """Lengths of the pieces of documents when none may be longer than a shard.

    >>> cut_lengths(np.array([3, 25, 1]), 10).tolist()
    [3, 10, 10, 5, 1]
    """
    pieces_D = -(-length_D // shard_tokens)
    is_last_P = np.zeros(pieces_D.sum(), bool)
    is_last_P[np.cumsum(pieces_D) - 1] = True
    length_P = np.full(len(is_last_P), shard_tokens)
    length_P[is_last_P] = length_D - (pieces_D - 1) * shard_tokens
    return length_P


# ---------------------------------------------------------------- the working folder: start, save, resume, publish


@contextmanager
def sole_writer(work: Path) -> Iterator[None]:
    """Hold the lock of the working folder; the system lets it go when we die, however we die."""
    import fcntl

    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{work}: another data.prepare is writing there; wait for it or stop it") from None
        yield


def is_done(out: Path, job: dict) -> bool:
    """Whether `out` is this job's finished result. InputError if it is anything else that is not empty."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise InputError(f"{out}: a file is in the way; choose another --out")
    if not (out / "prepare.json").exists():
        if any(out.iterdir()):
            raise InputError(f"{out}: already there, and not made by data.prepare; remove it or choose another --out")
        return False
    refuse_other_job(out, job)
    return True


def refuse_other_job(folder: Path, job: dict) -> None:
    """Raise InputError, saying what differs, if the folder's job is not `job`."""
    theirs = read_json(folder / "prepare.json").get("job", {})
    differing = [f"{key} is {theirs.get(key)!r} there, not {job[key]!r}" for key in job if theirs.get(key) != job[key]]
    if differing:
        raise InputError(f"{folder}: it holds another job ({'; '.join(differing)}); remove it or choose another --out")


def resume_or_start(work: Path, job: dict, tokenizer: str, encoding) -> dict:
    """The progress of this job in `work`; of a job that never got anywhere, a fresh one.

    corpus.json is there before the first shard: shards without one would be read as GPT-2's.
    """
    if (work / "prepare.json").exists():
        refuse_other_job(work, job)
        progress = read_json(work / "prepare.json")["progress"]
        for leftover in work.glob(".*.tmp"):
            leftover.unlink()
        check_parts(work, job, progress)
        print(
            f"continuing in {work}: {total_shards(progress)} shards and {total_tokens(progress):,} tokens are there",
            flush=True,
        )
        return progress
    for leftover in work.iterdir():
        if leftover.name != "lock":
            leftover.unlink()
    if "ranks" in job["tokenizer"]:
        shutil.copyfile(tokenizer, work / job["tokenizer"]["ranks"])
    describe(work, job, encoding)
    counts = {"documents": 0, "tokens": 0, "shards": 0, "pending": 0}
    progress = {"source": 0, "batch": 0, "bad": {}, "splits": {split: dict(counts) for split in SPLITS}}
    save(work, job, progress, [])
    return progress


def check_parts(work: Path, job: dict, progress: dict) -> None:
    """Raise InputError if a part file holds fewer tokens than `prepare.json` says: then bytes were lost."""
    for split, counts in progress["splits"].items():
        path = work / f"{job['name']}_{split}_{counts['shards']:06d}.part"
        held = path.stat().st_size // 2 if path.exists() else 0
        if held < counts["pending"]:
            raise InputError(f"{path}: {held} tokens, expected {counts['pending']}; remove {work} and start anew")


def save(work: Path, job: dict, progress: dict, writers: list[SplitWriter]) -> None:
    """Make everything so far safe against a kill: first the tokens, then the note that they are there."""
    for writer in writers:
        writer.sync()
    write_json(work / "prepare.json", {"job": job, "progress": progress})
    for writer in writers:
        writer.drop_old_parts()


def describe(work: Path, job: dict, encoding) -> dict:
    """Write corpus.json for the shards that are in `work` now."""
    return write_corpus_json(
        work,
        tokenizer=job["tokenizer"],
        vocab_size=encoding.n_vocab,
        bos_id=encoding.eot_token,
        source=" ".join(job["sources"]),
    )


def refuse_if_nothing(work: Path, progress: dict) -> None:
    """Raise InputError, leaving nothing behind, if no document was written."""
    if total_tokens(progress):
        return
    shutil.rmtree(work)
    if progress["bad"]:
        raise InputError(f"no document to write: {bad_rows(progress)}; is --field right?")
    raise InputError("no document to write: the sources hold no row, or --max-tokens is shorter than the first one")


def publish(work: Path, out: Path) -> None:
    """The one moment in which the corpus comes to be."""
    (work / "lock").unlink()
    os.rename(work, out)
    sync_folder(out.parent)


# ---------------------------------------------------------------- what is said on the way


def total_tokens(progress: dict) -> int:
    return sum(counts["tokens"] for counts in progress["splits"].values())


def total_shards(progress: dict) -> int:
    return sum(counts["shards"] for counts in progress["splits"].values())


def bad_rows(progress: dict) -> str:
    kinds = sorted(progress["bad"].items(), key=lambda item: -item[1])
    return f"{sum(progress['bad'].values()):,} bad rows ({', '.join(f'{count:,} {kind}' for kind, count in kinds)})"


def progress_bar(sources: list[Source]):
    """A bar over the bytes of the source files; silent where stderr is no terminal."""
    from tqdm import tqdm

    num_bytes = sum(source.num_bytes for source in sources)
    return tqdm(total=num_bytes or None, unit="B", unit_scale=True, disable=None, file=sys.stderr)


def show(bar, sources: list[Source], batch: Batch, progress: dict) -> None:
    if bar.disable:
        return
    bar.update(batch.num_bytes - bar.n)
    bar.set_postfix_str(
        f"source {batch.source + 1}/{len(sources)}, {total_tokens(progress) / 1e6:.1f}M tokens", refresh=False
    )


def print_summary(job: dict, progress: dict, seconds: float, new_tokens: int) -> None:
    for split, counts in progress["splits"].items():
        print(
            f"  {split:9} {counts['documents']:12,} documents {counts['tokens']:15,} tokens {counts['shards']:5} shards"
        )
    print(f"  {new_tokens:,} tokens in {seconds:.1f} s: {new_tokens / seconds / 1e6:.2f}M tokens/s, starting included")
    if progress["bad"]:
        print(f"left out: {bad_rows(progress)}")
    for split, share in (("val", job["val_fraction"]), ("reference", job["reference_fraction"])):
        if share and not progress["splits"][split]["documents"]:
            print(f"note: no document fell into {split}; give more text or a larger --{split}-fraction")


if __name__ == "__main__":
    command(main)
