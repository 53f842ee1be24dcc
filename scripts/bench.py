"""The one home of speed figures. Ratios are measured side by side in one run: a figure from another run is no baseline.

python -m scripts.bench order --json order.json

prepare   tokenising text, tokens/s of one core, beside tiktoken's own list-returning call
segments  the BOS scan and segment table, tokens/s of one core, beside the bare comparison it cannot do without
scoring   entropy, varentropy and NLL from hidden states, beside the head's GEMM, the seed's formula and a whole GPT-2
          124M; packing of the English corpus; merging the tables of 10M segments (`score` is the same)
order     from a measure to an order of 10M segments, time and memory, beside np.argsort of the same array
loader    shuffled documents to batches, beside a bare np.concatenate of the same slices and a stock reader of whole
          shards, from warm and cold page cache; the first batch of 10M segments; what a step waits for the loader
trainer   on a CPU the demo preset, tokens/s, beside a plain PyTorch GPT of its shape, and two processes beside one; on
          CUDA the presets anchor and speed: tokens/s, MFU, memory, where the time of a step goes

The JSON is flat: {"figure": number}, the unit or "over" in the key.
"""

import hashlib
import itertools
import json
import lzma
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from curriculum.records import read_run
from data.cli import InputError, command
from data.files import write_json

ROOT = Path(__file__).parents[1]
ENGLISH = ROOT.parent / "shared" / "corpus" / "english.jsonl.xz"


def main(name: str, /, json: Path | None = None) -> None:
    """Measure one part of the project on this machine and print its figures.

    Args:
        name: prepare, segments, scoring, order, loader or trainer.
        json: also write the figures here, as one flat JSON object.
    """
    if name not in BENCHES:
        raise InputError(f"no benchmark {name!r}; there are {', '.join(BENCHES)}")
    print(f"{name} on {machine()}")
    figures = {key: float(f"{value:.4g}") for key, value in BENCHES[name]().items()}
    for key, value in figures.items():
        print(f"  {key:45}{value:>16,.4g}")
    if json is not None:
        write_json(json, figures)


def machine() -> str:
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), model)
    return f"{model}, Python {platform.python_version()}, NumPy {np.__version__}"


def seconds(*functions: Callable[[], object], repeats: int = 5) -> list[float]:
    """Best time of each function. They take turns, so that a slow moment of the machine hits all alike."""
    for function in functions:
        function()  # warm caches, allocators, lazy imports
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            begin = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - begin)
    return best


def extra_mib(function: Callable[[], object]) -> float | None:
    """How far a call raises this process's memory at its highest; None where that cannot be known (not Linux)."""

    def kib(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget earlier peaks
    except OSError:
        return None
    before = kib("VmRSS")
    function()
    return (kib("VmHWM") - before) / 1024


def english_texts(max_characters: int) -> list[str]:
    """Documents of the English corpus beside the project, or of the standard library where it is not there."""
    if not ENGLISH.exists():
        from data.sample import stdlib_modules

        print(f"  {ENGLISH} is not there: the standard library's source instead")
        return list(stdlib_modules(max_characters)[0].values())
    texts, held = [], 0
    with lzma.open(ENGLISH, "rt", encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            held += len(texts[-1])
            if held >= max_characters:
                break
    return texts


def bench_prepare() -> dict:
    from data.prepare import encode_documents
    from data.tokenizer import gpt2

    encoding, texts = gpt2(), english_texts(8_000_000)
    num_tokens = len(encode_documents(texts, encoding))
    ours, plain = seconds(
        lambda: encode_documents(texts, encoding), lambda: [encoding.encode_ordinary(t) for t in texts], repeats=3
    )
    return {
        "prepare_tokens_per_second_per_core": num_tokens / ours,
        "prepare_over_tiktoken_encode_ordinary": plain / ours,
    }


def bench_segments() -> dict:
    from data.segments import find_segments

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50256, 100_000_000, dtype=np.uint16)
    tokens[np.cumsum(rng.geometric(1 / 690, 140_000))] = 50256  # FineWeb's mean document: 690 tokens
    ours, bare = seconds(lambda: find_segments(tokens, 50256, 1024), lambda: np.flatnonzero(tokens == 50256))
    return {"segments_tokens_per_second_per_core": len(tokens) / ours, "segments_time_over_bare_scan": ours / bare}


def bench_scoring() -> dict:
    return bench_head() | bench_forward() | bench_packing() | bench_merge()


def bench_head() -> dict:
    """The head of a GPT-2 124M alone: 8,192 hidden states of 768 numbers, 50,304 columns."""
    import torch

    from curriculum import moments
    from curriculum.moments import token_moments

    torch.manual_seed(0)
    on_cuda = torch.cuda.is_available()
    rows = 32768 if on_cuda else 8192
    how = dict(device="cuda", dtype=torch.bfloat16) if on_cuda else {}
    hidden, head = torch.randn(rows, 768, **how), torch.randn(50304, 768, **how) / 28
    target = torch.randint(50257, (rows,), device=hidden.device)
    some = slice(0, 2048)  # what the seed's formula can hold

    def timed(function):
        return lambda: (function(), torch.cuda.synchronize()) if on_cuda else function()

    def backend(name):
        return timed(lambda: token_moments(hidden, head, target, backend=name))

    def gemm_of_rows(at_once):
        buffer = torch.empty(at_once, len(head), dtype=hidden.dtype, device=hidden.device)

        def run():
            for part in hidden.split(at_once):
                torch.mm(part, head.T, out=buffer)

        return timed(run)

    def gemm_of_columns():
        buffer = torch.empty(2048, 2048, dtype=hidden.dtype, device=hidden.device)
        for part in hidden.split(2048):
            for columns in head.split(2048):
                torch.mm(part, columns.T, out=buffer[:, : len(columns)])

    def seeds_formula():  # entropy and varentropy each from their own log-softmax of full fp32 logits
        logits = (hidden[some] @ head.T).float()
        logp = logits.log_softmax(1)
        entropy = -(logp.exp() * logp).sum(1)
        again = logits.log_softmax(1)
        varentropy = (again.exp() * (again + entropy[:, None]) ** 2).sum(1)
        return -logp.gather(1, target[some, None]), entropy, varentropy

    with torch.inference_mode():
        torch.mm(hidden[:64], head[:64].T)  # BLAS's own buffers
        extra = extra_mib(lambda: token_moments(hidden, head, target, backend="auto"))
        ours = {name: backend(name) for name in ["eager", "compiled", "triton" if on_cuda else "native"]}
        # Whichever arrangement of the bare product is fastest here is the one to be compared with.
        gemms = {"rows": gemm_of_rows(128), "all": gemm_of_rows(2048), "columns": timed(gemm_of_columns)}
        took = seconds(*ours.values(), *gemms.values(), timed(seeds_formula), repeats=3)
    ours, bare, seed = dict(zip(ours, took, strict=False)), min(took[len(ours) : -1]), took[-1] * rows / 2048
    if moments._cannot_compile:
        print("  compiled is eager here: nothing can be compiled")
    default = ours[moments.auto_backend(hidden, head)]
    figures = {
        "ours_over_gemm": bare / default,
        "ours_over_seed": seed / default,
        **({} if extra is None else {"extra_mib": extra}),
        "gemm_tokens_per_second": rows / bare,
        "seed_tokens_per_second": rows / seed,
    }
    figures |= {f"{name}_tokens_per_second": rows / spent for name, spent in ours.items()}
    figures |= {f"{name}_over_gemm": bare / spent for name, spent in ours.items()}
    if on_cuda:
        figures["triton_over_compiled"] = ours["compiled"] / ours["triton"]
    return figures


def bench_forward() -> dict:
    """A whole model of GPT-2 124M's shape, random weights: scoring beside its forward and the head's bare product."""
    try:
        from transformers import GPT2Config, GPT2Model
    except ImportError:
        print("  ours_over_forward: not measured, transformers is not installed")
        return {}
    import torch

    from curriculum.moments import token_moments

    on_cuda = torch.cuda.is_available()
    rows, device = (32, "cuda") if on_cuda else (2, "cpu")
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config()).eval().to(device, torch.bfloat16 if on_cuda else torch.float32)
    head = model.wte.weight
    token = torch.randint(len(head), (rows, 1024), device=device)

    # Made once: touching so much fresh memory at every call would cost the bare product a tenth of its speed.
    logits = torch.empty(token.numel(), len(head), dtype=head.dtype, device=device)

    def after_forward(head_of):
        def run():
            head_of(model(token, use_cache=False).last_hidden_state.flatten(0, 1))
            if on_cuda:
                torch.cuda.synchronize()

        return run

    with torch.inference_mode():
        ours, bare = seconds(
            after_forward(lambda hidden: token_moments(hidden, head, token.flatten())),
            after_forward(lambda hidden: torch.mm(hidden, head.T, out=logits)),
            repeats=3,
        )
    figures = {"ours_over_forward": bare / ours}
    if on_cuda:
        figures["tokens_per_second"] = token.numel() / ours
    return figures


def bench_packing() -> dict:
    """Share of real tokens in rows of the size that scoring takes on a CPU, English documents cut at 1,024 tokens."""
    from data.prepare import encode_documents
    from data.segments import find_segments, packed_rows
    from data.tokenizer import gpt2

    tokens = np.asarray(encode_documents(english_texts(40_000_000), gpt2()))
    _, length_N = find_segments(tokens, 50256, 1024)
    num_tokens = int(length_N.sum(dtype=np.int64))

    def efficiency(row_tokens):
        return num_tokens / ((len(packed_rows(length_N, row_tokens)) - 1) * row_tokens)

    return {"packing_efficiency": efficiency(32768), "packing_efficiency_rows_of_65536": efficiency(65536)}


MERGE = """
import sys, time
from pathlib import Path
from curriculum.score import read_scores
begin = time.perf_counter()
scores = read_scores(sys.argv[1])
spent = time.perf_counter() - begin
assert len(scores.segments) == 10_000_000
# Not getrusage: its maximum is inherited from the process that started this one.
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
print(spent, peak)
"""


def bench_merge() -> dict:
    """Reading back and checking the tables of 10M segments of 100 shards, in a process of its own."""
    from curriculum.measures import MODEL_MEASURES, TEXT_MEASURES
    from curriculum.score import SCORES_VERSION, write_table

    rng = np.random.default_rng(0)
    length = rng.integers(1, 1025, 100_000).astype(np.int32)
    columns = dict(start=np.cumsum(length, dtype=np.int64) - length, length=length, num_bytes=length * 4)
    names = [name for name in (*TEXT_MEASURES, *MODEL_MEASURES) if name not in columns]
    columns |= {name: rng.random(100_000, dtype=np.float32) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(100):
            name = f"bench_train_{shard:06}"
            about = dict(
                id="bench",
                settings=dict(version=SCORES_VERSION, unit="document", max_len=1024),
                shard=f"{name}.bin",
                shard_sha256=f"{shard:064x}",
                fingerprint=f"{shard:032x}",
                num_tokens=int(length.sum()) + 1,
                segments=[0, len(length)],
            )
            write_table(Path(folder) / f"{name}.parquet", columns, about)
        root = Path(__file__).parents[1]
        child = [sys.executable, "-c", MERGE, folder]
        done = subprocess.run(child, cwd=root, check=True, capture_output=True, text=True)
    spent, peak = map(float, done.stdout.split())
    return {"merge_seconds": spent, "merge_peak_gib": peak}


ORDER = """
import sys, time
import numpy as np
from curriculum.diagnostics import describe
from curriculum.order import build_order
from curriculum.schedules import parse
num = int(sys.argv[1])
rng = np.random.default_rng(0)
values, length = rng.standard_normal(num), rng.integers(100, 1025, num, dtype=np.int32)
schedule = parse("then(fold(5), random, tau=0.2)")
def ours():
    describe(build_order(values, length, schedule, 64, 0), 262_144, lambda t: 1 - t)
best, peak = [np.inf, np.inf], 0
for _ in range(int(sys.argv[2])):  # by turns, so that a slow moment of the machine hits both alike
    for i, function in enumerate((ours, lambda: np.argsort(values))):
        begin = time.perf_counter()
        function()
        best[i] = min(best[i], time.perf_counter() - begin)
        peak = peak or int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(*best, peak / 2**20)
"""


def bench_order() -> dict:
    """From measure and lengths to an order and its diagnostics, in processes of their own; 64 bins, a random tail."""
    figures = {}
    for millions, repeats in ((1, 5), (10, 3)):
        child = [sys.executable, "-c", ORDER, str(millions * 1_000_000), str(repeats)]
        done = subprocess.run(child, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
        ours, argsort, peak = map(float, done.stdout.split())
        figures |= {f"order_seconds_{millions}m": ours, f"argsort_seconds_{millions}m": argsort}
        figures |= {"order_over_argsort": ours / argsort, "order_peak_gib": peak}  # the larger size stays
    return figures


BATCH_TOKENS, PARTS = 262_144, 8


def bench_loader() -> dict:
    from data.segments import corpus_segments
    from data.shards import open_corpus, write_shard

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50256, 50_000_000, dtype=np.uint16)
    tokens[np.cumsum(rng.geometric(1 / 690, 65_000))] = 50256
    with tempfile.TemporaryDirectory() as folder:
        for shard, part in enumerate(np.array_split(tokens, 5)):
            write_shard(Path(folder) / f"bench_train_{shard:06}.bin", part)
        corpus = open_corpus(folder, quiet=True)
        segments = corpus_segments(corpus, 1024)
        ids = rng.permutation(len(segments))
        figures = bench_reading(corpus, segments, ids) | bench_cold(corpus, segments, ids)
        waited = bench_waiting(corpus, segments, ids)
    with tempfile.TemporaryDirectory() as folder:
        last = trained("configs/demo.toml", make_sample(folder))
        demo = last["wait_s"] / last["time_s"]
    return {
        **figures,
        **bench_first_batch(),
        "loader_wait_over_step": max(waited, demo),
        "loader_wait_over_57_ms_step": waited,
        "loader_wait_over_demo_step": demo,
    }


def read_batches(stream):
    """Tokens of every whole batch of a stream, as it comes."""
    from curriculum.loader import batches

    for batch in batches(stream, BATCH_TOKENS, PARTS, steps=stream.num_tokens // BATCH_TOKENS):
        yield batch.num_tokens


def stock_reader(paths):
    """As in llm.c and modded-nanogpt: a shard is read whole, then cut."""
    from data.shards import HEADER_BYTES

    for path in paths:
        tokens = np.fromfile(path, np.uint16, offset=HEADER_BYTES)
        for at in range(0, len(tokens) - BATCH_TOKENS, BATCH_TOKENS):
            _ = tokens[at : at + BATCH_TOKENS].copy(), tokens[at + 1 : at + BATCH_TOKENS + 1].copy()
            yield BATCH_TOKENS


def bench_reading(corpus, segments, ids) -> dict:
    """Inputs, targets and bounds of micro-batches; the bare gather makes the inputs alone, a batch at a time."""
    from curriculum.loader import Stream
    from data.shards import read_shard

    stream = Stream(corpus, segments, ids)
    tokens = [np.array(read_shard(path)) for path in corpus.paths]
    columns = (segments.shard_N[ids], segments.start_N[ids], segments.start_N[ids] + segments.length_N[ids])
    edges = np.searchsorted(stream.end, np.arange(0, stream.num_tokens, BATCH_TOKENS)).tolist()
    spans_of_batch = [
        list(zip(*(column[a:b].tolist() for column in columns), strict=True)) for a, b in itertools.pairwise(edges)
    ]

    def gather():
        for spans in spans_of_batch:
            np.concatenate([tokens[shard][a:b] for shard, a, b in spans])

    ours, bare, stock = seconds(
        lambda: sum(read_batches(stream)), gather, lambda: sum(stock_reader(corpus.paths)), repeats=5
    )
    speed = sum(read_batches(stream)) / ours
    gathered = sum(b - a for spans in spans_of_batch for _, a, b in spans) / bare
    return {
        "tokens_per_second": speed,
        "loader_over_gather": speed / gathered,
        "gather_tokens_per_second": gathered,
        "stock_reader_tokens_per_second": sum(stock_reader(corpus.paths)) / stock,
    }


def bench_cold(corpus, segments, ids) -> dict:
    """The same from a cold page cache; nothing where it cannot be emptied (not Linux)."""
    from curriculum.loader import Stream

    if not hasattr(os, "posix_fadvise"):
        return {}

    def cold(reader) -> tuple[float, float]:
        for path in corpus.paths:  # of which no page may be mapped: mapped ones stay
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        items = reader()
        num_tokens = next(items)
        first = time.perf_counter() - begin
        return first, (num_tokens + sum(items)) / (time.perf_counter() - begin)

    first, speed = cold(lambda: read_batches(Stream(corpus, segments, ids)))
    stock_first, stock_speed = cold(lambda: stock_reader(corpus.paths))
    return {
        "cold_tokens_per_second": speed,
        "cold_first_batch_seconds": first,
        "cold_stock_reader_tokens_per_second": stock_speed,
        "cold_stock_reader_first_batch_seconds": stock_first,
    }


def bench_waiting(corpus, segments, ids) -> float:
    """Share of the time that steps of 57 ms, as long as a GPU's, wait for a batch; the first has its own figure."""
    from curriculum.loader import Counters, Stream, batches, prefetched

    counters, stream = Counters(), Stream(corpus, segments, ids)
    ready = prefetched(batches(stream, BATCH_TOKENS, PARTS, steps=51), counters=counters)
    next(ready)
    begin, before = time.perf_counter(), counters.wait_seconds
    for _ in ready:
        time.sleep(0.057)
    return (counters.wait_seconds - before) / (time.perf_counter() - begin)


FIRST_BATCH = """
import hashlib, sys, time
import numpy as np
from curriculum.loader import Stream, batches
from data.segments import corpus_segments
from data.shards import open_corpus
folder, ids_sha256, table_sha256, progress = sys.argv[1:]
begin = time.perf_counter()
segments = corpus_segments(open_corpus(folder, quiet=True), 1024)
ids = np.load(f"{folder}/order.npy", mmap_mode="r")
assert hashlib.sha256(ids.data).hexdigest() == ids_sha256
assert table_sha256 in ("", segments.digest())
stream = Stream(open_corpus(folder, quiet=True), segments, ids)
steps = stream.num_tokens // 262_144
batch = next(batches(stream, 262_144, 8, first_step=int(float(progress) * steps), steps=steps))
print(time.perf_counter() - begin, segments.digest(), len(segments), sum(len(part.input_T) for part in batch.parts))
"""


def bench_first_batch() -> dict:
    """Shards, segment table and order of 10M segments opened and checked, each time in a process of its own."""
    from data.segments import find_segments
    from data.shards import write_shard

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50256, 20_000_000, dtype=np.uint16)
    tokens[np.cumsum(rng.integers(10, 30, 1_000_000))[:-1]] = 50256  # short documents: many segments on a small disk
    root, table = Path(__file__).parents[1], ""
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(10):
            write_shard(Path(folder) / f"bench_train_{shard:06}.bin", tokens)
        ids = rng.permutation(10 * len(find_segments(tokens, 50256, 1024)[0])).astype(np.int32)
        np.save(Path(folder) / "order.npy", ids)
        took = []
        for progress in (0, 0, 0.5, 0.99):
            arguments = [folder, hashlib.sha256(ids.data).hexdigest(), table, str(progress)]
            child = [sys.executable, "-c", FIRST_BATCH, *arguments]
            done = subprocess.run(child, cwd=root, check=True, capture_output=True, text=True)
            spent, table, num_segments, num_tokens = done.stdout.split()
            assert int(num_segments) == len(ids) and int(num_tokens) == BATCH_TOKENS
            took.append(float(spent))
    return {
        "first_batch_seconds": max(took[1:]),  # at the order's beginning, middle and end
        "first_batch_seconds_without_segment_cache": took[0],
        "first_batch_million_segments": len(ids) / 1e6,
    }


def bench_trainer() -> dict:
    import torch

    return bench_presets() if torch.cuda.is_available() else bench_demo()


def bench_demo() -> dict:
    """On a CPU: the demo preset beside a plain GPT, by turns, and two processes beside one, each held to one core."""
    one_core = {"OMP_NUM_THREADS": "1"}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with tempfile.TemporaryDirectory() as folder:
        shards = make_sample(folder)
        ours, plain = [], []
        for _ in range(3):
            ours.append(trained("configs/demo.toml", shards)["tokens_per_second"])
            plain.append(plain_tokens_per_second(shards))
        alone, shared = [], []
        for _ in range(2):
            alone.append(trained("configs/demo.toml", shards, env=one_core, core=0)["tokens_per_second"])
            shared.append(trained("configs/demo.toml", shards, *two, env=one_core)["tokens_per_second"])
        last = trained("configs/demo.toml", shards)
    return {
        "demo_tokens_per_second": max(ours),
        "plain_tokens_per_second": max(plain),
        "demo_over_plain": max(ours) / max(plain),
        "one_process_tokens_per_second": max(alone),
        "two_processes_over_one": max(shared) / max(alone),
        "loader_wait_over_step": last["wait_s"] / last["time_s"],
        "demo_memory_gib": last["memory_gib"],
    }


def bench_presets() -> dict:
    """On CUDA: tokens/s, MFU, memory, and where a step's time goes, per preset, on random tokens."""
    from data.shards import write_shard

    figures, rng = {}, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", 30_000_000), ("val", 2_000_000)):
            tokens = rng.integers(0, 50256, count, dtype=np.uint16)
            tokens[np.cumsum(rng.geometric(1 / 690, count // 800))] = 50256  # documents as long as FineWeb's
            write_shard(Path(folder) / f"bench_{split}_000000.bin", tokens)
        for preset in ("anchor", "speed"):
            steps = ["--data.val_tokens", "1000000"]
            row = trained(f"configs/{preset}.toml", folder, settings=steps)
            split = trained(f"configs/{preset}.toml", folder, settings=[*steps, "--run.split_times"])
            figures |= {f"{preset}_tokens_per_second": row["tokens_per_second"], f"{preset}_mfu": row["mfu"]}
            figures[f"{preset}_memory_gib"] = row["memory_gib"]
            figures |= {
                f"{preset}_{phase}_over_step": split[f"{phase}_s"] / split["time_s"]
                for phase in ("forward", "backward", "optimizer", "wait")
            }
    return figures


def make_sample(folder: str) -> str:
    shards = f"{folder}/shards"
    sample = [sys.executable, "-m", "data.sample", "--out", shards, "--tokens", "300000"]
    subprocess.run(sample, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return shards


def trained(config: str, shards: str, *launcher: str, settings=(), env=None, core: int | None = None) -> dict:
    """The last training row of a run of 36 steps: its tokens/s are of the last 12, long after warming up."""
    steps = ["--run.steps", "36", "--run.log_every", "12", "--data.val_every", "36"]
    with tempfile.TemporaryDirectory() as folder:
        where = ["--data.shards", shards, "--run.out_dir", f"{folder}/run"]
        line = [sys.executable, *launcher, "train_gpt.py", config, *where, *steps, *settings]
        say = dict(cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ | (env or {}))
        if core is not None:
            say["preexec_fn"] = lambda: os.sched_setaffinity(0, {core})
        subprocess.run(line, **say)
        return [row for row in read_run(Path(folder) / "run").rows if "train_nats" in row][-1]


def plain_tokens_per_second(shards: str) -> float:
    """A GPT of the demo's shape as a PyTorch tutorial has it: modules, LayerNorm, GELU, AdamW on everything.

    The same vocabulary, rows, batches and threads; 24 steps after 12 to warm up.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    from curriculum.config import load
    from data.shards import open_corpus, read_shard

    cfg, corpus = load(ROOT / "configs/demo.toml"), open_corpus(shards, quiet=True)
    tokens, length = read_shard(corpus.paths[0]).astype(np.int64), cfg.data.seq_len
    layer = nn.TransformerEncoderLayer(
        cfg.model.model_dim,
        cfg.model.model_dim // cfg.model.head_dim,
        cfg.model.mlp_ratio * cfg.model.model_dim,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    torch.manual_seed(0)
    body = nn.TransformerEncoder(layer, cfg.model.num_layers, nn.LayerNorm(cfg.model.model_dim), False)
    embed, place = (nn.Embedding(count, cfg.model.model_dim) for count in (corpus.vocab_size, length))
    head = nn.Linear(cfg.model.model_dim, corpus.vocab_size, bias=False)
    causal = nn.Transformer.generate_square_subsequent_mask(length)
    optimizer = torch.optim.AdamW([p for m in (body, embed, place, head) for p in m.parameters()], lr=1e-3, fused=True)
    rows = cfg.data.micro_batch_tokens // length
    parts = cfg.data.batch_tokens // cfg.data.micro_batch_tokens
    for step in range(36):
        if step == 12:
            begin = time.perf_counter()
        for part in range(parts):
            at = (step * parts + part) * rows * length
            row = torch.from_numpy(tokens[at : at + rows * length + 1])
            hidden = body(embed(row[:-1].view(rows, length)) + place.weight, mask=causal, is_causal=True)
            (F.cross_entropy(head(hidden).view(-1, corpus.vocab_size), row[1:]) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return 24 * cfg.data.batch_tokens / (time.perf_counter() - begin)


BENCHES: dict[str, Callable[[], dict]] = {
    "prepare": bench_prepare,
    "segments": bench_segments,
    "scoring": bench_scoring,
    "score": bench_scoring,
    "order": bench_order,
    "loader": bench_loader,
    "trainer": bench_trainer,
}


if __name__ == "__main__":
    command(main)
