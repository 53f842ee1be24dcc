"""Where text comes from: files and datasets of the Hub, read as batches of rows.

A row is a line of JSON (bytes, unparsed: parsing is left to the workers) or a dict with the wanted field. Kinds of
file are told by their suffix; READERS and OPENERS at the end of the functions list them.
"""

import functools
import gzip
import importlib.util
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.cli import InputError

BATCH_BYTES = 1 << 18  # of JSON lines: one unit of work, about 0.03 s of tokenising
PARQUET_ROWS = 256  # rows of a Parquet or Hugging Face batch: about as many bytes of web text
MAX_DOCUMENT_BYTES = 1 << 28  # a longer text is one bad row: without a limit one file without line ends is all memory


class Source(NamedTuple):
    """One file or one dataset of the Hub."""

    name: str
    read: Callable[[str, str], Iterator[tuple[bytes | list, int]]]  # (name, field) -> (rows, bytes read so far)
    version: str  # changes when the content does
    num_bytes: int  # on disk; 0 for a dataset of the Hub


def find_sources(given: tuple[str, ...]) -> list[Source]:
    """The files and datasets meant by `given`. InputError if one is missing or of a kind we cannot read."""
    if not given:
        raise InputError("no source given: name files, folders or Hugging Face datasets")
    found: list[Source] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            known = [p for p in files if reader_of(p)]
            if not known:
                raise InputError(f"{name}: none of its {len(files)} files can be read; expected {KNOWN_SUFFIXES}")
            if len(known) < len(files):
                print(f"{name}: {len(files) - len(known)} of {len(files)} files are of another kind: not read")
            found += map(file_source, known)
        elif path.is_file():
            if not reader_of(path):
                raise InputError(f"{name}: suffix {path.suffix!r} says nothing we can read; expected {KNOWN_SUFFIXES}")
            found.append(file_source(path))
        elif name.startswith("hf:") or (re.fullmatch(r"[\w.-]+/[\w.@:-]+", name) and not reader_of(path)):
            found.append(hub_source(name))
        else:
            raise InputError(f"{name}: no such file or folder (a dataset of the Hub is written hf:NAME)")
    return found


def file_source(path: Path) -> Source:
    status = path.stat()
    return Source(str(path), reader_of(path), f"{status.st_size} bytes, {status.st_mtime_ns} ns", status.st_size)


def reader_of(path: Path) -> Callable | None:
    """The function that reads files of this name, None if we know none."""
    inner = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    reader = READERS.get(inner.suffix.lower())
    return None if reader is read_parquet and inner != path else reader


def read_lines(name: str, field: str) -> Iterator[tuple[bytes, int]]:
    """JSON lines, unparsed, in blocks that end with a line."""
    with open_stream(name) as (stream, file):
        while block := stream.read(BATCH_BYTES):
            # A line beyond the limit comes in several pieces, each a bad row ("not JSON").
            block += stream.readline(MAX_DOCUMENT_BYTES)
            yield block, file.tell()


def read_text(name: str, field: str) -> Iterator[tuple[list, int]]:
    """A whole text file, as the only row."""
    with open_stream(name) as (stream, file):
        yield [{field: stream.read(MAX_DOCUMENT_BYTES + 1)}], file.tell()


def read_parquet(name: str, field: str) -> Iterator[tuple[list, int]]:
    """The rows of a Parquet file, only the column that is needed."""
    import pyarrow as pa
    from pyarrow import parquet

    num_bytes, num_read = Path(name).stat().st_size, 0
    with parquet.ParquetFile(name) as file:
        columns = [field] if field in file.schema_arrow.names else []
        for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
            num_read += len(batch)
            rows = [{}] * len(batch)
            if columns:
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                # As bytes: invalid UTF-8 then costs its own row, and not the whole batch an exception.
                if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                    column = column.cast(pa.large_binary())
                rows = [{field: value} for value in column.to_pylist()]
            yield rows, num_bytes * num_read // file.metadata.num_rows


HUB_NAME = re.compile(
    r"(?:hf:)?(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<config>[^:]*))?(?::(?P<split>[^:]+))?"
)


def hub_source(name: str) -> Source:
    """A dataset of the Hub at the commit it has now: should it change, the job is another one."""
    parts = HUB_NAME.fullmatch(name)
    if not parts:
        raise InputError(f"{name}: expected hf:NAME[@REVISION][:CONFIG[:SPLIT]]")
    if importlib.util.find_spec("datasets") is None:
        raise InputError(f"{name}: the package `datasets` is needed to read from the Hub: pip install datasets")
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(parts["repo"], revision=parts["revision"], timeout=10).sha
    except Exception as error:  # the Hub's client lets whatever its HTTP library raises through
        raise InputError(
            f"{name}: no file of that name, and as a dataset of the Hugging Face Hub it cannot be had "
            f"({type(error).__name__}: {first_line(error)}); check the name and the network"
        ) from None
    return Source(name, functools.partial(read_hub, commit=commit), commit, 0)


def read_hub(name: str, field: str, commit: str) -> Iterator[tuple[list, int]]:
    """The rows of a dataset of the Hub, streamed."""
    from datasets import load_dataset

    parts = HUB_NAME.fullmatch(name)
    try:
        rows = load_dataset(
            parts["repo"], parts["config"] or None, split=parts["split"] or "train", revision=commit, streaming=True
        )
        if rows.column_names and field in rows.column_names:
            rows = rows.select_columns([field])
        for batch in rows.iter(PARQUET_ROWS):
            num_rows = len(next(iter(batch.values())))
            yield ([{field: value} for value in batch[field]] if field in batch else [{}] * num_rows), 0
    except Exception as error:  # `datasets` raises its own, fsspec's and the HTTP library's errors
        raise InputError(
            f"{name}: reading from the Hub failed ({type(error).__name__}: {first_line(error)}); "
            "run the same command to continue from the last finished shard"
        ) from None


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no details"])[0]


@contextmanager
def open_stream(name: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed bytes of a file, and the file itself, whose position tells how much of it was read."""
    opener = OPENERS.get(Path(name).suffix.lower())
    with open(name, "rb") as file:
        if opener is None:
            yield file, file
        else:
            with opener(file) as stream:
                yield stream, file


def open_zstd(file: BinaryIO) -> BinaryIO:
    # Arrow's reader and not the `zstandard` package's: that one takes a truncated file for a whole one.
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(file, compression="zstd"), BATCH_BYTES)


OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".zst": open_zstd}
READERS = {
    **dict.fromkeys([".jsonl", ".ndjson", ".json"], read_lines),
    **dict.fromkeys([".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".py"], read_text),
    ".parquet": read_parquet,
}
KNOWN_SUFFIXES = f"{' '.join(READERS)}, all but Parquet also with {' '.join(OPENERS)}"


class Batch(NamedTuple):
    """Some rows, and where they are: together with them `batch` batches of source number `source` are read."""

    source: int
    batch: int
    rows: bytes | list | None
    num_bytes: int  # of all the source files, up to here


def read_batches(sources: list[Source], field: str, source: int, batch: int) -> Iterator[Batch]:
    """Every batch after the first `batch` ones of sources[source]. A damaged file is an InputError."""
    import pyarrow as pa

    damage = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)
    bytes_before = sum(earlier.num_bytes for earlier in sources[:source])
    for index in range(source, len(sources)):
        try:
            for number, (rows, num_bytes) in enumerate(sources[index].read(sources[index].name, field), 1):
                if index > source or number > batch:
                    yield Batch(index, number, rows, bytes_before + num_bytes)
            bytes_before += sources[index].num_bytes
        except damage as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's failure, not the content's
            raise InputError(
                f"{sources[index].name}: damaged or cut short ({first_line(error)}); get it again, then start anew"
            ) from None
