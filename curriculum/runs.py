"""A run's surroundings: what it works on, its folder, its checkpoints, its log. Training itself is in train_gpt.py.

    work = prepare(cfg, print)                   # InputError, in one sentence, before anything is allocated
    folder = claim_folder(cfg, work, leads=True)

A run folder holds config.json, metrics.jsonl (the only source of truth), last.pt and last-1.pt (resume points),
step<k>.pt (kept checkpoints), and drawn/ (the ids an adaptive run drew).
"""

import ctypes
import hashlib
import json
import os
import platform
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curriculum.adaptive import Pool, open_pool
from curriculum.config import Config, Data, stage
from curriculum.loader import Plan, Stream, plan
from data.cli import InputError
from data.files import atomic_path, read_json, sha256_file, write_json
from data.segments import Segments, corpus_segments
from data.shards import Corpus, open_corpus

ROOT = Path(__file__).parents[1]
TRAINER = (
    "train_gpt.py",
    "curriculum/adaptive.py",
    "curriculum/config.py",
    "curriculum/loader.py",
    "curriculum/world.py",
    "curriculum/runs.py",
)  # the code of a run

# Dense bf16 tensor-core peaks of the vendors' data sheets, FLOP/s, for MFU; the first name found in a device's name.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


class Work(NamedTuple):
    """What a run works on, checked before it starts."""

    train: Stream
    val: Stream
    other_val: Stream  # the same tokens under the other public protocol: rows without mask, or documents with it
    val_tokens: int
    bin_N: np.ndarray | None  # of the validation segments
    corpus: Corpus
    unit: str  # what its segments are: documents, or windows without regard to them
    plan: Plan  # where every step begins in the stream, and how it is cut
    identity: dict  # all that must be equal for a run folder to be continued
    order: dict  # what the log says of the order
    pool: Pool | None  # what an adaptive run draws from

    @property
    def steps(self) -> int:
        return len(self.plan.parts_S)

    @property
    def tokens(self) -> int:
        return int(self.plan.begin_S[-1])


def prepare(cfg: Config, say: Callable[[str], None]) -> Work:
    """Open shards and order; raise InputError, in one sentence, on anything that does not fit together."""
    data = cfg.data
    corpus = open_corpus(data.shards, quiet=True)
    val_corpus = open_corpus(data.val_shards or corpus.folder, "val", quiet=True)
    if (val_corpus.vocab_size, val_corpus.tokenizer) != (corpus.vocab_size, corpus.tokenizer):
        raise InputError(f"{val_corpus.folder}: the validation shards have another tokenizer than {corpus.folder}")
    unit, order, recipe, bin_N = data.unit, None, "stock", None
    if path := data.order:
        from curriculum.order import check_segments, load_order, load_val_bins

        order = load_order(path)
        unit, recipe = order.manifest["unit"], order.manifest["recipe"]
        if order.manifest["max_len"] != data.seq_len:
            raise InputError(
                f"{path}: made for segments of at most {order.manifest['max_len']} tokens, "
                f"data.seq_len is {data.seq_len}"
            )
    segments = corpus_segments(corpus, data.seq_len, unit)
    val_segments = corpus_segments(val_corpus, data.seq_len, unit)
    if order is not None:
        check_segments(order, segments, path)
        if "val_segments_sha256" in order.manifest:
            if order.manifest["val_segments_sha256"] != val_segments.digest():
                raise InputError(f"{path}: its validation bins were made for other validation shards")
            bin_N = load_val_bins(path, order.manifest)
    ids = np.arange(len(segments)) if order is None else np.asarray(order.ids_N)
    train = Stream(corpus, segments, ids)
    steps = run_plan(train.num_tokens, cfg.run.steps, data)
    if (used := int(steps.begin_S[-1])) < train.num_tokens:
        say(f"note: the run stops after {used:,} of the order's {train.num_tokens:,} tokens; other orders see others")
    # Rows of the public protocol are 1,024 tokens; a model that never saw so many is asked about what it saw.
    other = corpus_segments(val_corpus, data.seq_len if unit == "window" else min(1024, data.seq_len), OTHER[unit])
    val = stock(val_corpus, val_segments)
    pool = None
    if order is not None and "adaptive" in order.manifest:
        validated = validations(data, len(steps.parts_S))
        held = bin_tokens(val, data.val_tokens, bin_N)
        pool = open_pool(path, order.manifest, train, steps, validated, held)
        recipe += f", decided at {len(validated)} validations, the first after step {validated[0]}"
    if data.val_tokens > val.num_tokens:
        say(f"note: only {val.num_tokens:,} validation tokens there, {data.val_tokens:,} asked for: using all")
    begins = {}
    if cfg.run.init_from:
        if not Path(cfg.run.init_from).is_file():
            raise InputError(f"run.init_from {cfg.run.init_from}: no such checkpoint")
        begins = dict(init_sha256=sha256_file(cfg.run.init_from))
    identity = dict(
        # A branch of a run is another arm than a run from scratch, wherever its checkpoint lies.
        digest=cfg.digest(f"{recipe} from {begins['init_sha256']}" if begins else recipe),
        name=cfg.run.name,
        seed=cfg.run.seed,
        order_sha256=order.manifest["order_sha256"] if order else "stock",
        segments_sha256=segments.digest(),
        val_segments_sha256=val_segments.digest(),
        **begins,
    )
    multiset_sha256 = hashlib.sha256(np.sort(ids.astype(np.int64)).data).hexdigest()
    about = dict(
        recipe=recipe,
        order_sha256=identity["order_sha256"],
        multiset_sha256=multiset_sha256,
        tokens=train.num_tokens,
    )
    if order is not None:
        keys = ("measure", "schedule", "bins", "layout", "multiset", "epochs", "seed", "num_segments", "adaptive")
        about |= {key: order.manifest[key] for key in keys if key in order.manifest}
    if pool is not None and used < train.num_tokens:
        about["multiset_sha256"] = None  # not known before the run's end: of the pool, what it chose
    val_tokens = min(data.val_tokens, val.num_tokens)
    return Work(train, val, stock(val_corpus, other), val_tokens, bin_N, corpus, unit, steps, identity, about, pool)


OTHER = {"document": "window", "window": "document"}


def stock(corpus: Corpus, segments: Segments) -> Stream:
    """A corpus as it lies in its shards."""
    return Stream(corpus, segments, np.arange(len(segments)))


def validations(data: Data, steps: int) -> list[int]:
    """The steps after which a run is validated.

    >>> validations(Data(val_every=8, val_every_late=1), 22)
    [8, 16, 20, 21, 22]
    """

    def due(step: int) -> bool:
        late = data.val_every_late if step > 0.9 * steps else 0
        return step % (late or data.val_every) == 0 or step == steps

    return [step for step in range(1, steps + 1) if due(step)]


def bin_tokens(val: Stream, val_tokens: int, bin_N: np.ndarray | None) -> np.ndarray:
    """Of the first `val_tokens` validation tokens, how many lie in each bin; none known without bins."""
    if bin_N is None:
        return np.empty(0)
    inside_N = np.diff(np.minimum(val.end, val_tokens), prepend=0)
    return np.bincount(bin_N, weights=inside_N)


def run_plan(num_tokens: int, steps: int, data: Data) -> Plan:
    """Where the batches of a run begin, into how many micro-batches each is cut, and the longest document of each.

    `steps` counts batches of data.batch_tokens: with a batch schedule it is a number of tokens. 0 means all tokens;
    then the last batch holds what is left. Raises InputError if there are fewer tokens than asked for.

    >>> shape = dict(batch_tokens=400, micro_batch_tokens=100, seq_len=50)
    >>> run_plan(1000, 0, Data(**shape)).begin_S.tolist()
    [0, 400, 800, 1000]
    >>> [x.tolist() for x in run_plan(1000, 2, Data(**shape, batch_schedule=(0.5, 1), seq_schedule=(0.4, 1)))]
    [[0, 200, 400, 800], [2, 2, 4], [20, 20, 50]]
    """
    wanted = (steps or -(-num_tokens // data.batch_tokens)) * data.batch_tokens
    if wanted - num_tokens >= data.batch_tokens:
        raise InputError(
            f"run.steps {steps} of {data.batch_tokens} tokens need {wanted} tokens, "
            f"the order holds {num_tokens} ({-(-num_tokens // data.batch_tokens)} steps)"
        )
    end, at, rows = min(wanted, num_tokens), 0, []
    while at < end:
        tokens = round(stage(data.batch_schedule, at / end) * data.batch_tokens)
        max_len = max(1, round(stage(data.seq_schedule, at / end) * data.seq_len))
        rows.append((min(tokens, end - at), tokens // data.micro_batch_tokens, max_len))
        at += tokens
    batch_tokens, num_parts, max_lens = zip(*rows, strict=True)
    return plan(num_tokens, batch_tokens, num_parts, len(rows), max_lens)


def check_shares(work: Work, processes: int) -> None:
    """Raise InputError if some step's micro-batches cannot be shared out evenly."""
    for parts in set(work.plan.parts_S.tolist()):
        if parts % processes:
            raise InputError(
                f"{parts} micro-batches (a step's tokens / data.micro_batch_tokens) cannot be shared "
                f"by {processes} processes"
            )


@contextmanager
def out_of_memory_advised(cfg: Config) -> Iterator[None]:
    """Within, running out of memory is a sentence that names the setting to turn."""
    import torch

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise InputError(
            f"out of memory ({str(error).splitlines()[0]}); lower data.micro_batch_tokens, now "
            f"{cfg.data.micro_batch_tokens}: the result stays the same, up to rounding"
        ) from None


# -- The folder


def claim_folder(cfg: Config, work: Work, leads: bool) -> Path:
    """The run folder, new or this very run's; another run's, and one that cannot be written, is refused."""
    folder = Path(cfg.run.out_dir or f"runs/{cfg.run.name}-{work.identity['digest']}/seed{cfg.run.seed}")
    known = folder / "config.json"
    if known.exists():
        stored, ours = read_json(known), cfg.model_dump(mode="json")
        theirs, tables = stored.get("identity", {}), stored.get("config", {})
        for key, mine in work.identity.items():
            if theirs.get(key) != mine:
                settings = [(f"{t}.{k}", tables.get(t, {}).get(k), v) for t in ours for k, v in ours[t].items()]
                changed = [f"{name} {old}, now {new}" for name, old, new in settings if old != new]
                raise InputError(
                    f"{folder}: holds a run with another {key} ({theirs.get(key)}, this one has {mine}; "
                    f"settings: {'; '.join(changed) or 'equal'}); choose another run.out_dir or remove the folder"
                )
    elif leads:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder}: not empty and not a run folder; choose another run.out_dir")
        try:
            write_json(known, dict(identity=work.identity, config=cfg.model_dump(mode="json")))
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another run.out_dir") from None
    return folder


def about_run(cfg: Config, work: Work, device, processes: int, **more) -> dict:
    """The first row of metrics.jsonl: everything needed to say what the others mean."""
    import torch

    code = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in TRAINER))
    cuda = device.type == "cuda"
    return dict(
        kind="run",
        name=cfg.run.name,
        seed=cfg.run.seed,
        steps=work.steps,
        config=cfg.model_dump(mode="json"),
        identity=work.identity,
        order=work.order,
        val_tokens=work.val_tokens,
        code_sha256=code.hexdigest(),
        hardware=dict(
            device=torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            cuda=torch.version.cuda,
            numpy=np.__version__,
            python=platform.python_version(),
        ),
        processes=processes,
        **more,
    )


def peak_flops(device) -> float | None:
    """What MFU is measured against: the bf16 peak of a known GPU; None on a CPU and on unknown ones."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def memory_gib(device) -> float | None:
    """Most memory this process has held so far: the GPU's, or the machine's where only a CPU works (Linux)."""
    if device.type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    try:  # not getrusage: it counts what the parent held when it forked
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 2**20, 3)


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks: giving them back and faulting them in again at every use costs a CPU run a
    third of its speed (LOG.md, 2026-11-21: 6.1k -> 9.0k tokens/s)."""
    if sys.platform == "linux":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def diverged(what: str, step: int, folder: Path) -> str:
    """The sentence that ends a run which has gone astray; a state like that is never saved."""
    return (
        f"{what} at step {step}: the run diverged; lower the learning rates (the last good checkpoint is in {folder})"
    )


# -- Checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    import torch

    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path) -> dict:
    """Tensors and plain values only: no code of the file is run. Raises InputError if it is not whole."""
    import torch

    try:
        # torch reads a changed byte without complaint; the zip's checksums (1 GB/s) notice.
        damaged = zipfile.ZipFile(path).testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises whatever its unpickler meets
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from None
    raise InputError(f"{path}: not a readable checkpoint (the checksum of {damaged} is wrong)")


def resume_points(folder: Path) -> list[Path]:
    """last.pt, last-1.pt, ...: the newest first."""
    older = sorted(folder.glob("last-*.pt"), key=lambda path: int(path.stem.removeprefix("last-")))
    return [path for path in (folder / "last.pt", *older) if path.exists()]


def save_resume_point(folder: Path, state: dict, keep: int) -> None:
    """Write last.pt and keep the `keep` - 1 before it. At every moment there is a whole one under one of the names."""
    last = folder / "last.pt"
    names = [last, *(folder / f"last-{age}.pt" for age in range(1, keep))]
    for newer, older in reversed(list(zip(names[1:], names[2:], strict=False))):
        if newer.exists():
            os.replace(newer, older)
    if keep > 1 and last.exists():
        twin = folder / ".last.tmp"  # a second name for the same file, where the file system has them
        twin.unlink(missing_ok=True)
        try:
            os.link(last, twin)
        except OSError:
            shutil.copyfile(last, twin)
        os.replace(twin, names[1])
    save_checkpoint(last, state)


def newest_resume_point(folder: Path, leads: bool, say: Callable[[str], None]) -> dict | None:
    """The newest whole resume point; None if there is none at all. Damaged ones are said, put aside and passed over."""
    damaged: list[Path] = []
    for path in resume_points(folder):
        try:
            state = load_checkpoint(path)
        except InputError as error:
            say(f"note: {error}; trying the one before")
            damaged.append(path)
            continue
        for bad in damaged if leads else ():
            bad.rename(bad.with_suffix(".damaged"))
        return state
    if damaged:
        raise InputError(
            f"{damaged[0]}: not a readable checkpoint, and no older one is; remove {folder} to start again"
        )
    return None


# -- The log


class Log:
    """metrics.jsonl, appended and flushed row by row by the first process; `size` is part of a checkpoint."""

    def __init__(self, path: Path, size: int, leads: bool, mirrors: list[Callable[[dict], None]]):
        self.leads, self.size, self.mirrors = leads, size, mirrors
        if leads:
            path.touch()
            os.truncate(path, size)  # rows after the resume point will be written again, the same
            self.file = open(path, "a", encoding="utf-8")

    def write(self, record: dict) -> None:
        if self.leads:
            record = {key: value for key, value in record.items() if value is not None}
            line = json.dumps(record, allow_nan=False) + "\n"
            self.file.write(line)
            self.file.flush()
            self.size += len(line.encode())
            for mirror in self.mirrors:
                mirror(record)

    def say(self, message: str) -> None:
        if self.leads:
            print(message, flush=True)


def check_mirrors(cfg: Config) -> None:
    """Raise InputError if a logger that was asked for is not installed."""
    for wanted, module, setting in (
        (cfg.run.wandb != "off", "wandb", f"run.wandb {cfg.run.wandb}"),
        (cfg.run.tensorboard, "tensorboard", "run.tensorboard true"),
    ):
        if wanted:
            try:
                __import__(module if module == "wandb" else "torch.utils.tensorboard")
            except ImportError:
                raise InputError(
                    f"{setting}: needs the package {module}: pip install {module}, or leave it off"
                ) from None


def open_mirrors(cfg: Config, work: Work, folder: Path) -> list[Callable[[dict], None]]:
    """Functions that copy a row of metrics.jsonl elsewhere; metrics.jsonl stays the only thing that is read back."""
    mirrors = []
    if cfg.run.wandb != "off":
        import wandb

        run = wandb.init(
            project="entropy-curriculum",
            group=cfg.run.name,
            name=f"{cfg.run.name}-{cfg.run.seed}",
            id=hashlib.sha256(json.dumps(work.identity).encode()).hexdigest()[:12],  # a continued run goes on there
            resume="allow",
            mode=cfg.run.wandb,
            dir=str(folder),
            config=cfg.model_dump(mode="json"),
        )
        mirrors.append(lambda row: run.log(scalars(row), step=row["step"]) if "step" in row else None)
    if cfg.run.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def write(row):
            for name, value in scalars(row).items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        mirrors.append(write)
    return mirrors


def scalars(row: dict) -> dict[str, float]:
    """The numbers of a row; a list is told apart by its index, gaps in it are left out.

    >>> scalars({"step": 3, "tokens": 5, "val_nats": 1.5, "bin_nats": [2.0, None]})
    {'tokens': 5, 'val_nats': 1.5, 'bin_nats/0': 2.0}
    """
    if "step" not in row:
        return {}
    found = {}
    for name, value in row.items():
        values = {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        found |= {n: v for n, v in values.items() if isinstance(v, int | float) and n != "step"}
    return found
