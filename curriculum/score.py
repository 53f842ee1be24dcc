"""Score every segment of a corpus once with a reference model: shards in, one Parquet table per shard out.

    python -m curriculum.score data/stdlib --reference runs/reference --out scores/stdlib
    torchrun --nproc-per-node 8 -m curriculum.score data/fineweb10B --reference runs/reference --out scores/fineweb
    python -m curriculum.score --verify scores/stdlib

A table has one row per segment: its place, every model-free measure, every measure of the reference (`nll`, `entropy`,
...; nats). Provenance (shard hash, reference hash, settings, versions) lies in the Parquet metadata, so that one rename
commits both; everything in it that changes numbers makes up one id, and tables of different ids are never mixed.

Work is cut into units, runs of segments of a shard. A unit is done when its file is there; after a kill the same
command scores what is missing, and the tables come out the same to the byte, whatever the number of workers
(`curriculum.engine`). When all units of a shard are there they become its table. Validation shards (`_val_` in the
name) are scored too, for the per-bin validation loss; they never enter an order, and corpus-wide token frequencies are
counted on the training shards alone.

    out/*.parquet             the tables
    out/per_token/*.parquet   nll, entropy, varentropy of every prediction (float16), with --per-token
    out/scored.json           how to score again: shards, references, code version
    out/units/                while unfinished: units done so far, plan.json, <unit>.error.json of failed ones
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curriculum.engine import Ranks, RayWorkers, hold_folder, this_launch
from curriculum.measures import TEXT_MEASURES, model_measures, text_measures, unigram_nll
from data.cli import InputError, command, fail
from data.files import atomic_path, digest, read_json, sha256_file, write_json, write_text
from data.segments import Segments, find_segments, packed_rows
from data.shards import Corpus, check_vocab, fingerprint, open_corpus, read_shard
from data.tokenizer import of_corpus, token_bytes

SCORES_VERSION = 2  # of the tables and of the code that computes them: raise it when either gives other numbers
LARGEST_FP16 = 65504.0


def main(
    shards: str = "",
    /,
    reference: str = "",
    out: Path | None = None,
    early_reference: str = "",
    max_len: int = 1024,
    unit: str = "document",
    device: str = "auto",
    dtype: str = "auto",
    row_tokens: int = 0,
    unit_tokens: int = 10_000_000,
    val: bool = True,
    engine: str = "ranks",
    workers: int = 0,
    per_token: bool = False,
    verify: Path | None = None,
    verify_segments: int = 64,
    push_to_hub: str = "",
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
        row_tokens: tokens in one forward pass; 0 means 65536 on CUDA, 32768 on CPU (never less than max_len).
        unit_tokens: tokens in one unit of work, what a kill can lose.
        val: score the validation shards of the folder too.
        engine: ranks (this process, or all that torchrun or srun start) or ray (a Ray cluster, or this machine).
        workers: of --engine ray; 0 means one per GPU, or one per machine without GPUs.
        per_token: keep nll, entropy and varentropy of every prediction too, 6 bytes a token before compression.
        verify: instead of scoring, score a random sample of this folder's segments again, one by one, and report the
            largest differences. Shards and references are those it was made with unless they are given.
        verify_segments: how many.
        push_to_hub: upload the finished tables as this dataset (owner/name) of the Hugging Face Hub.
    """
    job = Job(shards, reference, early_reference, max_len, unit, device, dtype, row_tokens, unit_tokens, val, per_token)
    if verify is not None:
        return verify_scores(verify, job, verify_segments)
    if not (shards and reference and out):
        raise InputError("expected SHARDS, --reference and --out (or --verify DIR); see --help")
    if engine not in ("ranks", "ray"):
        raise InputError(f"--engine {engine}: expected ranks or ray")
    if workers < 0:
        raise InputError(f"--workers {workers}: expected a positive number, or 0")
    job.check()
    train, validation = open_splits(shards, val)
    launch = this_launch()
    if engine == "ray" and launch.world > 1:
        raise InputError("--engine ray starts its own workers: run one process, not torchrun or srun")
    with hold_folder(out, launch):
        open_worker = partial(open_scorer, job, count_tokens(train))
        if engine == "ray":
            engaged = RayWorkers(open_worker, workers, use_gpu=device != "cpu")
        else:
            engaged = nullcontext(Ranks(out, launch, open_worker))
        with engaged as crew:
            settings = crew.settings()
            plan = [u for corpus in (train, validation) if corpus for u in plan_units(corpus, settings, out, per_token)]
            finaliser = launch.rank == 0
            if finaliser:
                announce(out, plan, job)
            lost = crew.score(plan)
        if not finaliser:
            return
        merge_all(out, plan, lost)
    if lost:
        for reason in dict.fromkeys(lost.values()):
            names = [name for name in lost if lost[name] == reason]
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            print(f"  not scored: {shown}: {reason}")
        fail(f"{len(lost)} of {len(plan)} units are missing in {out}; the same command tries them again", 1)
    summarise(read_scores(out))
    if push_to_hub:
        push(out, push_to_hub)


# ---------------------------------------------------------------- what is scored, and by what


@dataclass(frozen=True)
class Job:
    """The options that say what is to be scored; main explains them."""

    shards: str
    reference: str
    early_reference: str
    max_len: int
    unit: str
    device: str
    dtype: str
    row_tokens: int
    unit_tokens: int
    val: bool
    per_token: bool

    def check(self) -> None:
        if self.row_tokens < 0 or self.unit_tokens < 1:
            raise InputError(
                f"--row-tokens {self.row_tokens}, --unit-tokens {self.unit_tokens}: expected positive numbers"
            )
        if self.early_reference and self.reference == "none":
            raise InputError("--early-reference needs a --reference to be compared with")
        if self.per_token and self.reference == "none":
            raise InputError("--per-token needs a --reference: measures without a model are of whole segments")


def open_splits(shards: str, val: bool, quiet: bool = False) -> tuple[Corpus, Corpus | None]:
    """Training shards, and validation shards where there are any."""
    where = Path(shards)
    if not where.is_dir():
        corpus = open_corpus(shards, quiet=quiet)
        if any("_val_" in path.name for path in corpus.paths):
            raise InputError(f"{shards}: validation shards cannot be scored as training data; name a folder instead")
        return corpus, None
    has_val = val and any(where.glob("*_val_*.bin"))
    return open_corpus(where, "train", quiet=quiet), open_corpus(where, "val", quiet=True) if has_val else None


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

        from curriculum.moments import device_backend

        device = next(iter(models.values())).device
        moments = device_backend(device.type)
        attention = "varlen_attn" if device.type == "cuda" else "scaled_dot_product_attention"  # train_gpt.attend
        found |= {"torch": torch.__version__, "device": device.type, "attention": attention, "moments": moments}
        if device.type == "cuda":
            found["gpu"] = torch.cuda.get_device_name(device)
    return found


@dataclass(frozen=True)
class Scorer:
    """What one worker holds: the models, and what every segment is measured with."""

    models: dict  # {role: Reference}: reference, early_reference; empty for none
    bos_id: int
    pieces: list  # bytes of every token id
    frequency_nll_V: np.ndarray
    settings: dict  # everything that changes numbers

    def score(self, unit: "Unit", advance: Callable[[int], object]) -> None:
        """Score a unit and write its files, the table last: where it is, the others are."""
        columns, token_columns = score_unit(unit, self, advance)
        for output in reversed(unit.outputs):
            write_table(output.part, token_columns if output == unit.tokens else columns, unit.provenance)


def open_scorer(job: Job, count_V: np.ndarray, local_rank: int = 0) -> Scorer:
    """Open the references on this worker's device."""
    train, _ = open_splits(job.shards, job.val, quiet=True)
    models = {}
    for role, name in (("reference", job.reference), ("early_reference", job.early_reference)):
        if name and name != "none":
            from curriculum.reference import open_reference

            device = own_device(job.device, local_rank)
            models[role] = open_reference(name, train, job.max_len, device=device, dtype=job.dtype)
    refuse_incomparable(job, models)
    on_cuda = any(model.device.type == "cuda" for model in models.values())
    settings = dict(
        version=SCORES_VERSION,
        tokenizer=train.tokenizer,
        unit=job.unit,
        max_len=job.max_len,
        row_tokens=max(job.row_tokens or (65536 if on_cuda else 32768), job.max_len),
        unit_tokens=job.unit_tokens,
        unigram=digest(count_V.tolist()),
        **{role: model.about for role, model in models.items()},
        **versions(models),
    )
    return Scorer(models, train.bos_id, token_bytes(of_corpus(train)), unigram_nll(count_V), settings)


def refuse_incomparable(job: Job, models: dict) -> None:
    """Raises InputError where a reference with a tokenizer of its own cannot give what is asked for."""
    if job.per_token and models["reference"].retokenizer:
        raise InputError(f"--per-token: {job.reference} has another tokenizer: its predictions are not of these tokens")
    if len({model.about.get("tokenizer_sha256") for model in models.values()}) > 1:
        raise InputError(
            f"{job.reference} and {job.early_reference} have different tokenizers: nll per token of one cannot be "
            "subtracted from the other's; score them into two folders and compare nll_per_byte"
        )


def own_device(device: str, local_rank: int) -> str:
    """Of several GPUs on this machine, the one of this rank."""
    if device not in ("auto", "cuda"):
        return device
    import torch

    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        return device
    torch.cuda.set_device(local_rank % num_gpus)
    return f"cuda:{local_rank % num_gpus}"


# ---------------------------------------------------------------- units


class Output(NamedTuple):
    part: Path  # of one unit
    whole: Path  # of the whole shard


class Unit(NamedTuple):
    """A run of segments of one shard, and where its scores go."""

    name: str
    shard: Path
    start_N: np.ndarray
    length_N: np.ndarray
    scores: Output
    tokens: Output | None  # with --per-token
    provenance: dict

    @property
    def outputs(self) -> list[Output]:
        return [self.scores] + ([self.tokens] if self.tokens else [])

    @property
    def done(self) -> bool:
        """Parts are looked for first: they go only when the whole is there."""
        return all(o.part.exists() or o.whole.exists() for o in self.outputs)

    @property
    def num_tokens(self) -> int:
        return int(self.length_N.sum(dtype=np.int64))

    @property
    def error_file(self) -> Path:
        return self.scores.part.with_name(f"{self.name}.error.json")


def plan_units(corpus: Corpus, settings: dict, out: Path, per_token: bool = False) -> list[Unit]:
    """All units of a corpus, in order. Raises InputError if the folder holds scores of anything else."""
    units = []
    scores_id = digest(settings)
    for path in corpus.paths:
        tokens = read_shard(path)
        check_vocab(path, tokens, corpus.vocab_size)
        start_N, length_N = find_segments(tokens, corpus.bos_id, settings["max_len"], settings["unit"])
        if len(start_N) == 0:
            raise InputError(f"{path}: a single token has no next one to predict: nothing to score")
        of_shard = dict(
            id=scores_id,
            settings=settings,
            shard=path.name,
            shard_sha256=corpus.sha256(path),
            fingerprint=fingerprint(path),
            num_tokens=len(tokens),
        )
        unit_N = (start_N // settings["unit_tokens"]).astype(np.int64)
        cuts = np.flatnonzero(np.diff(unit_N, prepend=-1, append=-1))
        for number, (first, last) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            name = f"{path.stem}.{number:05}"
            unit = Unit(
                name,
                path,
                start_N[first:last],
                length_N[first:last],
                Output(out / "units" / f"{name}.parquet", out / f"{path.stem}.parquet"),
                Output(out / "units" / f"{name}.tokens.parquet", out / "per_token" / f"{path.stem}.parquet")
                if per_token
                else None,
                of_shard | {"segments": [int(first), int(last)]},
            )
            for output in unit.outputs:
                refuse_other(output.part, unit.provenance)
                if number == 0:
                    refuse_other(output.whole, unit.provenance)
            units.append(unit)
    return units


def refuse_other(path: Path, ours: dict) -> None:
    """Raises InputError if there is a table and it was not made from the same shard with the same settings."""
    try:
        theirs = read_provenance(path)
    except FileNotFoundError:  # perhaps only just: the finaliser removes units as it merges them
        return
    for key in ("shard_sha256", "fingerprint", "num_tokens"):
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


def score_unit(unit: Unit, scorer: Scorer, advance: Callable[[int], object]) -> tuple[dict, dict]:
    """All columns of a unit's segments, and those of its predictions: a pure function of shard, models and settings."""
    begin, end = int(unit.start_N[0]), int(unit.start_N[-1] + unit.length_N[-1])
    target_T = np.asarray(read_shard(unit.shard)[begin + 1 : end + 1])
    columns = dict(start=unit.start_N, length=unit.length_N)
    text = text_measures(target_T, unit.length_N, scorer.pieces, scorer.frequency_nll_V)
    columns |= {"num_bytes": text["num_bytes"]} | {name: text[name] for name in TEXT_MEASURES if name != "length"}
    # Every reference passes over the same tokens: of each advance the bar moves by that reference's share.
    share = Shares(advance, len(scorer.models))
    found = {role: by_reference(unit, model, scorer, text["num_bytes"], share) for role, model in scorer.models.items()}
    measured, token_columns = found.get("reference", ({}, {}))
    columns |= measured
    if "early_reference" in found:
        columns["learnability"] = found["early_reference"][0]["nll"] - columns["nll"]
    if not found:
        advance(end - begin)
    return columns, {name: np.minimum(m, LARGEST_FP16).astype(np.float16) for name, m in token_columns.items()}


class Shares:
    """Turns n tokens done by one of `parts` references into whole tokens done by all, none lost to rounding."""

    def __init__(self, advance: Callable[[int], object], parts: int):
        self.advance, self.parts, self.held = advance, parts, 0

    def __call__(self, tokens: int) -> None:
        whole, self.held = divmod(self.held + tokens, self.parts)
        self.advance(whole)


def by_reference(unit: Unit, model, scorer: Scorer, num_bytes_N: np.ndarray, advance) -> tuple[dict, dict]:
    """Columns of a unit's segments by one reference, and of its predictions if it reads the shards' own ids."""
    tokens, row_tokens = read_shard(unit.shard), scorer.settings["row_tokens"]
    if model.retokenizer:
        from curriculum.retokenize import retokenized_measures

        places = (unit.start_N, unit.length_N, num_bytes_N)
        return retokenized_measures(model, tokens, scorer.bos_id, scorer.pieces, *places, row_tokens, advance), {}
    begin = int(unit.start_N[0])
    end_N = np.cumsum(unit.length_N, dtype=np.int64)
    text_T = np.asarray(tokens[begin : begin + int(end_N[-1]) + 1])
    bounds = packed_rows(unit.length_N, row_tokens)
    parts = []
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        # Segments tile the shard, so a packed row of whole segments is one slice of it.
        low, high = int(end_N[first - 1]) if first else 0, int(end_N[last - 1])
        documents = np.concatenate([[0], end_N[first:last] - low]).astype(np.int32)
        parts.append(model.moments(text_T[low:high], text_T[low + 1 : high + 1], documents))
        advance(high - low)
    moments = [np.concatenate([part.numpy() for part in column]) for column in zip(*parts, strict=True)]
    measured = model_measures(*moments, unit.length_N, num_bytes_N)
    return measured, dict(zip(("nll", "entropy", "varentropy"), moments, strict=True))


# ---------------------------------------------------------------- tables


def write_table(path: Path, columns: dict[str, np.ndarray], provenance: dict) -> None:
    """One Parquet file with its provenance inside, atomically; the same input gives the same bytes."""
    import pyarrow as pa

    with table_writer(path, pa.table(columns).schema, provenance) as write:
        write(pa.table(columns))


@contextmanager
def table_writer(path: Path, schema, provenance: dict) -> Iterator[Callable]:
    """A function that appends Arrow tables to a new Parquet file, a row group each; the file is there at the end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema.with_metadata({"provenance": json.dumps(provenance, sort_keys=True)})
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    with atomic_path(path) as temporary:
        with pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        ) as writer:
            yield lambda table: writer.write_table(table.replace_schema_metadata(schema.metadata), table.num_rows)


def read_provenance(path: Path) -> dict:
    """The provenance in a table's metadata. Raises FileNotFoundError, or InputError if the file is no table of ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return json.loads(pq.read_schema(path).metadata[b"provenance"])
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a whole score table ({type(error).__name__}); remove it and score again"
        ) from None


def announce(out: Path, plan: list[Unit], job: Job) -> None:
    """Mark the folder as unfinished until every table is there: a missing shard must not go unnoticed.

    How to score again is noted beside the tables rather than in them: a path or a commit changes no number.
    """
    if all(o.whole.exists() for u in plan for o in u.outputs):
        return

    def absolute(name: str) -> str:
        return str(Path(name).absolute()) if name and (name == job.shards or Path(name).exists()) else name

    origin = {role: absolute(getattr(job, role)) for role in ("shards", "reference", "early_reference")}
    write_json(out / "scored.json", dict(id=plan[0].provenance["id"], **origin, code=code_version()))
    write_json(out / "units" / "plan.json", dict(units=[u.name for u in plan]))


def merge_all(out: Path, plan: list[Unit], lost: dict[str, str]) -> None:
    """Units become tables, shard by shard, where none of a shard's is lost; then they go."""
    of_shard: dict[Path, list[Unit]] = {}
    for unit in plan:
        of_shard.setdefault(unit.shard, []).append(unit)
    for units in of_shard.values():
        if not any(u.name in lost for u in units):
            for outputs in zip(*(u.outputs for u in units), strict=True):
                merge_units(units, outputs)
    folder = out / "units"
    if not lost:
        (folder / "plan.json").unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def merge_units(units: list[Unit], outputs: tuple[Output, ...]) -> None:
    """The parts of one shard, in order, become the whole. One part at a time is in memory."""
    import pyarrow.parquet as pq

    whole = outputs[0].whole
    if not whole.exists():
        for unit, output in zip(units, outputs, strict=True):
            rows = unit.num_tokens if output == unit.tokens else len(unit.start_N)
            if read_provenance(output.part) != unit.provenance or pq.read_metadata(output.part).num_rows != rows:
                raise InputError(f"{output.part}: not the scores this command would make; remove it and score again")
        provenance = units[0].provenance | {"segments": [0, units[-1].provenance["segments"][1]]}
        with table_writer(whole, pq.read_schema(outputs[0].part), provenance) as write:
            for output in outputs:
                write(pq.read_table(output.part))
    for output in outputs:
        output.part.unlink(missing_ok=True)
    # What killed workers were writing. Everything is written by now, so nobody is at it.
    for file in (whole, *(o.part for o in outputs)):
        for left_behind in file.parent.glob(f".{file.name}.*.tmp"):
            left_behind.unlink(missing_ok=True)


def code_version() -> dict:
    """Git commit of this code and whether it was edited since; empty where there is no repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return dict(commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain", "-uno")))
    except (OSError, subprocess.CalledProcessError):
        return {}


# ---------------------------------------------------------------- reading


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
    if any((folder / "units").glob("[!.]*")):
        raise InputError(f"{folder}: scoring is not finished there; run the same curriculum.score command again")
    if not paths:
        raise InputError(f"{folder}: no score table of {split} shards there; make them with curriculum.score")
    about = [read_provenance(path) for path in paths]
    for path, provenance in zip(paths, about, strict=True):
        if (version := provenance["settings"].get("version")) != SCORES_VERSION:
            raise InputError(f"{path}: score format version {version}, expected {SCORES_VERSION}: score again")
        if provenance["id"] != about[0]["id"]:
            raise InputError(f"{path}: scored with other settings than {paths[0].name}: score them again together")

    def column(name: str) -> np.ndarray:  # one at a time: whole tables beside their copies would be twice the memory
        return np.concatenate([pq.read_table(path, columns=[name])[name].to_numpy() for path in paths])

    try:
        counts = [pq.read_metadata(path).num_rows for path in paths]
        columns = {name: column(name) for name in pq.read_schema(paths[0]).names if name != "num_bytes"}
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{folder}: a table is damaged ({error}); remove it and score again") from None
    segments = Segments(
        np.repeat(np.arange(len(paths), dtype=np.int32), counts),
        columns.pop("start"),
        columns["length"].astype(np.int32),
        tuple(a["fingerprint"] for a in about),
    )
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
    if "num_reference_tokens" in scores.columns:
        from curriculum.retokenize import describe

        print(f"  {describe(scores.columns)}")
    elif "nll" in scores.columns:
        mean = np.average(scores.columns["nll"], weights=scores.segments.length_N)
        print(f"  the reference's loss on these tokens: {mean:.5f} nats")


# ---------------------------------------------------------------- verifying


# Of |difference| / (1 + |value|). A segment alone takes other kernels than one packed among others, and another GPU
# others again: bfloat16 hidden states then differ by their rounding.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def verify_scores(folder: Path, job: Job, num_segments: int, seed: int = 0) -> None:
    """Score a random sample of segments again, each alone, and print the largest difference of every measure.

    Exit code 1 if one exceeds its tolerance. Raises InputError if shards or references are not those of the tables.
    """
    if num_segments < 1:
        raise InputError(f"--verify-segments {num_segments}: expected at least 1")
    tables = [read_scores(folder)]
    if any(folder.glob("*_val_*.parquet")):
        tables.append(read_scores(folder, "val"))
    settings = tables[0].settings
    origin = read_json(folder / "scored.json") if (folder / "scored.json").exists() else {}
    if not (shards := job.shards or origin.get("shards")):
        raise InputError(f"{folder}: says nothing of where its shards lie (no scored.json); give them before --verify")
    job = replace(
        job,
        shards=shards,
        reference=job.reference or origin.get("reference", "none"),
        early_reference=job.early_reference or origin.get("early_reference", ""),
        max_len=settings["max_len"],
        unit=settings["unit"],
        dtype=settings["reference"]["dtype"] if "reference" in settings else "auto",
        row_tokens=settings["row_tokens"],
        unit_tokens=settings["unit_tokens"],
    )
    corpora = [corpus for corpus in open_splits(shards, val=True) if corpus]
    scorer = open_scorer(job, count_tokens(corpora[0]))
    refuse_other_origin(folder, settings, scorer.settings)

    sizes = [len(scores.segments) for scores in tables]
    total = sum(sizes)
    sample = np.sort(np.random.default_rng(seed).choice(total, min(num_segments, total), replace=False))
    largest: dict[str, float] = {}
    excess: dict[str, float] = {}
    allowed = TOLERANCE[job.dtype if "reference" in settings else "float32"]
    path_of = {path.name: path for corpus in corpora for path in corpus.paths}
    for scores, first in zip(tables, np.cumsum([0, *sizes[:-1]]), strict=True):
        chosen = sample[(sample >= first) & (sample < first + len(scores.segments))] - first
        refuse_other_shards(folder, scores, sorted(set(scores.segments.shard_N[chosen].tolist())), path_of)
        for i in chosen.tolist():
            again = score_alone(scores, i, path_of, scorer)
            for name, column in scores.columns.items():
                was, now = float(column[i]), float(again[name][0])
                same = was == now or (np.isnan(was) and np.isnan(now))
                difference = 0.0 if same else abs(was - now) if np.isfinite(was - now) else np.inf
                largest[name] = max(largest.get(name, 0.0), difference)
                excess[name] = max(excess.get(name, 0.0), difference / (1 + abs(now)) / allowed if difference else 0.0)
    print(f"{len(sample)} of {total:,} segments scored again, one by one; {folder}, id {tables[0].id}")
    print(f"  {'measure':17}{'largest difference':>20}   share of the tolerance, {allowed:g} (1 + |value|)")
    for name, difference in largest.items():
        print(f"  {name:17}{difference:20.3g}{excess[name]:9.1%}")
    if wrong := [name for name, share in excess.items() if not share <= 1]:
        fail(f"{folder}: {', '.join(wrong)} cannot be reproduced", 1)


def score_alone(scores: Scores, i: int, path_of: dict[str, Path], scorer: Scorer) -> dict[str, np.ndarray]:
    """The columns of one segment, packed with no other."""
    places, one = scores.segments, slice(i, i + 1)
    path = path_of[scores.shards[places.shard_N[i]]["name"]]
    nowhere = Output(Path(), Path())
    unit = Unit("alone", path, places.start_N[one], places.length_N[one], nowhere, None, {})
    columns, _ = score_unit(unit, scorer, lambda tokens: None)
    return {name: np.asarray(column, np.float32) for name, column in columns.items()}


def refuse_other_origin(folder: Path, recorded: dict, ours: dict) -> None:
    """Raises InputError if corpus or references are not those of the tables; says which libraries differ."""
    for what in ("tokenizer", "unigram"):
        if recorded[what] != ours[what]:
            raise InputError(f"{folder}: made from other training shards ({what} differs)")
    for role in ("reference", "early_reference"):
        theirs, found = (about.get(role, {}).get("weights_sha256") for about in (recorded, ours))
        if theirs != found:
            raise InputError(
                f"{folder}: made with the {role.replace('_', ' ')} of weights {str(theirs)[:12]}, this one has "
                f"{str(found)[:12]}; give it with --{role.replace('_', '-')}"
            )
    if differ := [key for key, value in ours.items() if recorded.get(key) != value]:
        print(f"note: {', '.join(differ)} differ from when the tables were made")


def refuse_other_shards(folder: Path, scores: Scores, used: list[int], path_of: dict[str, Path]) -> None:
    """Raises InputError unless these shards hold, to the byte, what was scored."""
    for shard in used:
        name, sha256 = scores.shards[shard]["name"], scores.shards[shard]["sha256"]
        if name not in path_of:
            raise InputError(f"{folder}: scores of {name}, which is not among the shards")
        if sha256_file(path_of[name]) != sha256:
            raise InputError(f"{path_of[name]}: changed since it was scored (its SHA-256 is not the recorded one)")


# ---------------------------------------------------------------- publishing


def write_card(folder: Path) -> None:
    """README.md with the YAML by which `datasets.load_dataset` and the Hub find the tables."""
    scores = read_scores(folder)
    names = {p.name: p.name for p in sorted(folder.glob("*.parquet"))}
    per_token = {p.name: f"per_token/{p.name}" for p in sorted((folder / "per_token").glob("*.parquet"))}
    lines = ["---", "configs:"]
    for config, files in (("scores", names), ("per_token", per_token)):
        if not files:
            continue
        lines += [f"- config_name: {config}"] + (["  default: true"] if config == "scores" else []) + ["  data_files:"]
        for split, is_val in (("train", False), ("validation", True)):
            if of_split := [path for name, path in files.items() if ("_val_" in name) == is_val]:
                lines += [f"  - split: {split}", "    path:", *(f"    - {json.dumps(path)}" for path in of_split)]
    lines += [
        "---",
        "",
        "# What a language model thinks of every segment of a corpus",
        "",
        f"{len(scores.segments):,} training segments ({scores.segments.num_tokens:,} tokens), id `{scores.basis}`,"
        " scored by `curriculum.score`. One row per segment, in the order of the shards: `start` and `length` (tokens,"
        " within its shard), `num_bytes`, and measures (nats; means over the segment's predictions).",
        "",
        "```json",
        json.dumps(dict(settings=scores.settings, shards=scores.shards), indent=1),
        "```",
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))


def push(folder: Path, repo: str) -> None:
    """Upload tables and card to the Hub. Raises InputError if that cannot be reached or refuses."""
    import huggingface_hub

    write_card(folder)
    files = ["README.md", "*.parquet"]  # not scored.json: paths of this machine
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repo, repo_type="dataset", exist_ok=True)
        url = hub.upload_folder(repo_id=repo, repo_type="dataset", folder_path=folder, allow_patterns=files)
    except Exception as error:  # the library's own errors, its HTTP library's and OSError alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{repo}: not uploaded ({reason}); the tables lie complete in {folder}") from None
    print(f"uploaded to {url}")


if __name__ == "__main__":
    # Under its own name: what is sent to Ray's workers is looked up in modules, and `__main__` is another one there.
    from curriculum import score

    command(score.main)
