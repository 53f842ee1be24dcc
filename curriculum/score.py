"""Score every segment of a corpus once with a reference model: shards in, one Parquet table per shard out.

    python -m curriculum.score data/stdlib --reference runs/reference --out scores/stdlib

A table has one row per segment: its place, every model-free measure, every measure of the reference (`nll`, `entropy`,
...; nats). Provenance (shard hash, reference hash, settings, versions) lies in the Parquet metadata, so that one rename
commits both; everything in it that changes numbers makes up one id, and tables of different ids are never mixed.

Work is cut into units, runs of segments of a shard. A unit is done when its file is there; after a kill the same
command scores what is missing, and the tables come out the same to the byte. When all units of a shard are there they
become its table. Validation shards (`_val_` in the name) are scored too, for the per-bin validation loss; they never
enter an order, and corpus-wide token frequencies are counted on the training shards alone.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curriculum.measures import TEXT_MEASURES, model_measures, text_measures, unigram_nll
from data.cli import InputError, command
from data.files import atomic_path, digest
from data.segments import Segments, find_segments, packed_rows
from data.shards import Corpus, check_vocab, fingerprint, open_corpus, read_shard
from data.tokenizer import of_corpus, token_bytes

SCORES_VERSION = 2


def main(
    shards: str,
    /,
    reference: str,
    out: Path,
    early_reference: str = "",
    max_len: int = 1024,
    unit: str = "document",
    device: str = "auto",
    dtype: str = "auto",
    row_tokens: int = 0,
    unit_tokens: int = 10_000_000,
    val: bool = True,
) -> None:
    """Score every segment of token shards with a reference model.

    Args:
        shards: a folder (its *_train_*.bin and *_val_*.bin), a .bin file or a glob.
        reference: a run folder or checkpoint of train_gpt.py, a transformers model directory or Hub id, or none for
            the measures that need no model.
        out: folder for the tables, one Parquet file per shard.
        early_reference: a second, weaker reference (an earlier checkpoint of the same run): adds the column
            learnability = its nll - the reference's nll.
        max_len: longest segment (tokens); training must use the same.
        unit: what a segment is: document (a piece of one) or window (fixed, ignoring documents).
        device: auto, cpu or cuda.
        dtype: of a transformers reference: auto (bfloat16 on CUDA, float32 on CPU), float32 or bfloat16.
        row_tokens: tokens in one forward pass; 0 means 65536 on CUDA, 8192 on CPU (never less than max_len).
        unit_tokens: tokens in one unit of work, what a kill can lose.
        val: score the validation shards of the folder too.
    """
    train, validation = open_splits(shards, val)
    if row_tokens < 0 or unit_tokens < 1:
        raise InputError(f"--row-tokens {row_tokens}, --unit-tokens {unit_tokens}: expected positive numbers")
    encoding = of_corpus(train)
    models = {}
    if early_reference and reference == "none":
        raise InputError("--early-reference needs a --reference to be compared with")
    for role, name in (("reference", reference), ("early_reference", early_reference)):
        if name and name != "none":
            from curriculum.reference import open_reference

            models[role] = open_reference(name, train, max_len, device=device, dtype=dtype)
    on_cuda = any(model.device.type == "cuda" for model in models.values())
    row_tokens = max(row_tokens or (65536 if on_cuda else 8192), max_len)

    with only_scorer(out):
        count_V = count_tokens(train)
        settings = dict(
            version=SCORES_VERSION,
            tokenizer=train.tokenizer,
            unit=unit,
            max_len=max_len,
            row_tokens=row_tokens,
            unit_tokens=unit_tokens,
            unigram=digest(count_V.tolist()),
            **{role: model.about for role, model in models.items()},
            **versions(models),
        )
        plan = [u for corpus in (train, validation) if corpus for u in plan_units(corpus, settings, out)]
        score_units(plan, models, encoding, count_V, row_tokens)
        for table in dict.fromkeys(u.table for u in plan):
            merge_units([u for u in plan if u.table == table])
    summarise(read_scores(out))


def open_splits(shards: str, val: bool) -> tuple[Corpus, Corpus | None]:
    """Training shards, and validation shards where there are any."""
    where = Path(shards)
    if not where.is_dir():
        corpus = open_corpus(shards)
        if any("_val_" in path.name for path in corpus.paths):
            raise InputError(f"{shards}: validation shards cannot be scored as training data; name a folder instead")
        return corpus, None
    has_val = val and any(where.glob("*_val_*.bin"))
    return open_corpus(where, "train"), open_corpus(where, "val", quiet=True) if has_val else None


@contextmanager
def only_scorer(out: Path) -> Iterator[None]:
    """Hold the folder: a second scorer started on it is refused. The lock dies with its process."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{out}: another scorer is at work in this folder; wait for it or choose another --out"
            ) from None
        yield


def count_tokens(corpus: Corpus) -> np.ndarray:
    """How often each id occurs in the corpus, int64 (vocab_size,). Token ids are checked on the way."""
    count_V = np.zeros(corpus.vocab_size, np.int64)
    for path in corpus.paths:
        tokens = read_shard(path)
        check_vocab(path, tokens, corpus.vocab_size)
        for at in range(0, len(tokens), 1 << 24):
            count_V += np.bincount(tokens[at : at + (1 << 24)], minlength=corpus.vocab_size)
    return count_V


def versions(models: dict) -> dict:
    """Libraries whose version can change numbers."""
    import zstandard

    found = {"zstandard": zstandard.__version__}
    if models:
        import torch

        device = next(iter(models.values())).device
        found |= {"torch": torch.__version__, "device": device.type}
        if device.type == "cuda":
            found["gpu"] = torch.cuda.get_device_name(device)
    return found


class Unit(NamedTuple):
    """A run of segments of one shard, and where its scores go."""

    shard: Path
    bos_id: int
    start_N: np.ndarray
    length_N: np.ndarray
    table: Path  # of the whole shard
    file: Path  # of this unit
    provenance: dict


def plan_units(corpus: Corpus, settings: dict, out: Path) -> list[Unit]:
    """All units of a corpus, in order. Raises InputError if the folder holds scores of anything else."""
    units = []
    scores_id = digest(settings)
    for path in corpus.paths:
        tokens = read_shard(path)
        check_vocab(path, tokens, corpus.vocab_size)
        start_N, length_N = find_segments(tokens, corpus.bos_id, settings["max_len"], settings["unit"])
        if len(start_N) == 0:
            raise InputError(f"{path}: a single token has no next one to predict: nothing to score")
        table = out / f"{path.stem}.parquet"
        unit_N = (start_N // settings["unit_tokens"]).astype(np.int64)
        cuts = np.flatnonzero(np.diff(unit_N, prepend=-1, append=-1))
        for number, (first, last) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            provenance = dict(
                id=scores_id,
                settings=settings,
                shard=path.name,
                shard_sha256=corpus.sha256(path),
                fingerprint=fingerprint(path),
                num_tokens=len(tokens),
                segments=[int(first), int(last)],
            )
            file = out / "units" / f"{path.stem}.{number:05}.parquet"
            unit = Unit(path, corpus.bos_id, start_N[first:last], length_N[first:last], table, file, provenance)
            for existing in (table, file):
                if existing.exists():
                    refuse_other(existing, provenance)
            units.append(unit)
    return units


def refuse_other(path: Path, ours: dict) -> None:
    """Raises InputError unless a table was made from the same shard with the same settings."""
    theirs = read_provenance(path)
    for key in ("shard_sha256", "num_tokens"):
        if theirs.get(key) != ours[key]:
            raise InputError(
                f"{path}: scores of another {ours['shard']} ({key} {theirs.get(key)}, now {ours[key]}): the shard has "
                "changed since; choose another --out or remove the scores"
            )
    if theirs["id"] != ours["id"]:
        changed = [k for k, v in ours["settings"].items() if theirs["settings"].get(k) != v]
        raise InputError(
            f"{path}: made with other settings ({', '.join(changed) or 'fewer references'} differ): scores are never "
            "mixed; choose another --out or remove them"
        )


def score_units(plan: list[Unit], models: dict, encoding, count_V: np.ndarray, row_tokens: int) -> None:
    """Score what is missing, unit by unit, with a progress bar in tokens."""
    from tqdm import tqdm

    total = sum(int(u.length_N.sum(dtype=np.int64)) for u in plan)
    bar = tqdm(total=total, unit="tok", unit_scale=True, desc="scoring", mininterval=1.0)
    pieces, frequency_nll_V = token_bytes(encoding), unigram_nll(count_V)
    with bar:
        for unit in plan:
            if unit.table.exists() or unit.file.exists():
                bar.update(int(unit.length_N.sum(dtype=np.int64)))
                continue
            columns = score_unit(unit, models, pieces, frequency_nll_V, row_tokens, bar.update)
            write_table(unit.file, columns, unit.provenance)


def score_unit(unit: Unit, models: dict, pieces, frequency_nll_V, row_tokens: int, advance) -> dict[str, np.ndarray]:
    """All columns of a unit's segments: a pure function of the shard, the models and the settings."""
    tokens = read_shard(unit.shard)
    begin, end = int(unit.start_N[0]), int(unit.start_N[-1] + unit.length_N[-1])
    text_T = np.asarray(tokens[begin : end + 1])
    columns = dict(start=unit.start_N, length=unit.length_N)
    text = text_measures(text_T[1:], unit.length_N, pieces, frequency_nll_V)
    columns |= {"num_bytes": text["num_bytes"]} | {name: text[name] for name in TEXT_MEASURES if name != "length"}
    # Segments tile the shard, so a packed row of whole segments is one slice of it.
    bounds = packed_rows(unit.length_N, row_tokens)
    found: dict[str, list] = {role: [] for role in models}
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        low = int(unit.start_N[first]) - begin
        documents = np.concatenate([[0], np.cumsum(unit.length_N[first:last])]).astype(np.int32)
        row = slice(low, low + int(documents[-1]))
        for role, model in models.items():
            found[role].append(model.moments(text_T[row], text_T[row.start + 1 : row.stop + 1], documents))
        advance(int(documents[-1]))
    measured = {
        role: model_measures(
            *(np.concatenate([part.numpy() for part in parts]) for parts in zip(*rows, strict=True)),
            unit.length_N,
            text["num_bytes"],
        )
        for role, rows in found.items()
    }
    columns |= measured.get("reference", {})
    if "early_reference" in measured:
        columns["learnability"] = measured["early_reference"]["nll"] - columns["nll"]
    return columns


def write_table(path: Path, columns: dict[str, np.ndarray], provenance: dict) -> None:
    """One Parquet file with its provenance inside, atomically; the same input gives the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns).replace_schema_metadata({"provenance": json.dumps(provenance, sort_keys=True)})
    floats = [name for name, column in columns.items() if column.dtype == np.float32]
    with atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            use_dictionary=False,
            column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        )


def read_provenance(path: Path) -> dict:
    """The provenance in a table's metadata. Raises InputError if the file is no table of ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return json.loads(pq.read_schema(path).metadata[b"provenance"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a whole score table ({type(error).__name__}); remove it and score again"
        ) from None


def merge_units(units: list[Unit]) -> None:
    """The units of one shard, in order, become its table; then they go."""
    import pyarrow.parquet as pq

    table = units[0].table
    if not table.exists():
        parts = [pq.read_table(u.file) for u in units]
        columns = {n: np.concatenate([p[n].to_numpy() for p in parts]) for n in parts[0].column_names}
        provenance = units[0].provenance | {"segments": [0, len(columns["start"])]}
        write_table(table, columns, provenance)
    for unit in units:
        unit.file.unlink(missing_ok=True)
    if units[0].file.parent.exists() and not any(units[0].file.parent.iterdir()):
        units[0].file.parent.rmdir()


@dataclass(frozen=True)
class Scores:
    """The score tables of a folder, shard after shard."""

    columns: dict[str, np.ndarray]  # (N,) each: `length` and every measure
    segments: Segments
    id: str  # of these tables together: settings and shards
    basis: str  # of the settings alone: equal for train and validation tables that may be compared
    shards: list[dict]  # name and sha256 of each
    settings: dict

    @property
    def unit(self) -> str:
        return self.settings["unit"]

    @property
    def max_len(self) -> int:
        return self.settings["max_len"]


def read_scores(folder: Path | str, split: str = "train") -> Scores:
    """Tables of the training shards, or with split="val" of the validation shards.

    Raises InputError if there are none, units are still missing, or tables of different settings lie together.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    paths = sorted(p for p in folder.glob("*.parquet") if ("_val_" in p.name) == (split == "val"))
    if any((folder / "units").glob("*.parquet")):
        raise InputError(f"{folder}: scoring is not finished there; run the same curriculum.score command again")
    if not paths:
        raise InputError(f"{folder}: no score table of {split} shards there; make them with curriculum.score")
    about = [read_provenance(path) for path in paths]
    for path, provenance in zip(paths, about, strict=True):
        if (version := provenance["settings"].get("version")) != SCORES_VERSION:
            raise InputError(f"{path}: score format version {version}, expected {SCORES_VERSION}: score again")
        if provenance["id"] != about[0]["id"]:
            raise InputError(f"{path}: scored with other settings than {paths[0].name}: score them again together")
    try:
        tables = [pq.read_table(path) for path in paths]
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{folder}: a table is damaged ({error}); remove it and score again") from None
    counts = [t.num_rows for t in tables]
    whole = pa.concat_tables([t.replace_schema_metadata(None) for t in tables])
    columns = {name: whole[name].to_numpy() for name in whole.column_names}
    segments = Segments(
        np.repeat(np.arange(len(paths), dtype=np.int32), counts),
        columns.pop("start"),
        columns["length"].astype(np.int32),
        tuple(a["fingerprint"] for a in about),
    )
    del columns["num_bytes"]
    shards = [dict(name=a["shard"], sha256=a["shard_sha256"]) for a in about]
    return Scores(columns, segments, digest([about[0]["id"], shards]), about[0]["id"], shards, about[0]["settings"])


def summarise(scores: Scores) -> None:
    """Counts, and the spread of every measure, on the terminal."""
    print(
        f"{len(scores.segments):,} segments, {scores.segments.num_tokens:,} tokens "
        f"in {len(scores.shards)} shards; id {scores.id}"
    )
    print(f"  {'measure':17}{'min':>11}{'mean':>11}{'max':>11}{'NaN':>8}")
    for name, column in scores.columns.items():
        whole = column[np.isfinite(column)]
        spread = [whole.min(), whole.mean(), whole.max()] if len(whole) else [np.nan] * 3
        print(f"  {name:17}{spread[0]:11.4g}{spread[1]:11.4g}{spread[2]:11.4g}{len(column) - len(whole):8}")
    if "nll" in scores.columns:
        mean = np.average(scores.columns["nll"], weights=scores.segments.length_N)
        print(f"  the reference's loss on these tokens: {mean:.5f} nats")


if __name__ == "__main__":
    command(main)
