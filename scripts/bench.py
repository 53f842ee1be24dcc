"""The one home of speed figures. Ratios are measured side by side in one run: a figure from another run is no baseline.

python -m scripts.bench order --json order.json

prepare   tokenising text, tokens/s of one core, beside tiktoken's own list-returning call
segments  the BOS scan and segment table, tokens/s of one core, beside the bare comparison it cannot do without
score     entropy, varentropy and NLL from hidden states, beside the head's GEMM and the two-log-softmax formula
order     from a measure to an order, beside np.argsort of the same array
loader    shuffled documents to batches, beside a bare np.concatenate of the same slices
trainer   the demo preset's training step, tokens/s, and the share of it that waits for the loader

The JSON is flat: {"figure": number}, the unit or "over" in the key.
"""

import json
import lzma
import platform
import resource
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

ENGLISH = Path(__file__).parents[2] / "shared" / "corpus" / "english.jsonl.xz"


def main(name: str, /, json: Path | None = None) -> None:
    """Measure one part of the project on this machine and print its figures.

    Args:
        name: prepare, segments, score, order, loader or trainer.
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


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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


def bench_score() -> dict:
    import torch

    from curriculum.moments import token_moments

    torch.manual_seed(0)
    hidden, head = torch.randn(1024, 768), torch.randn(50304, 768) / 28
    target = torch.randint(50257, (1024,))

    def ours():
        return token_moments(hidden, head, target)

    def gemm():
        for at in range(0, 1024, 128):
            torch.mm(hidden[at : at + 128], head.T)

    def two_log_softmaxes():  # entropy and varentropy each from their own log-softmax of full logits
        logits = hidden @ head.T
        logp = logits.log_softmax(1)
        entropy = -(logp.exp() * logp).sum(1)
        again = logits.log_softmax(1)
        varentropy = (again.exp() * (again + entropy[:, None]) ** 2).sum(1)
        return -logp.gather(1, target[:, None]), entropy, varentropy

    with torch.inference_mode():
        before = peak_mib()  # the highest so far: what the first call adds is its extra memory
        ours()
        extra = peak_mib() - before
        mine, bare, full = seconds(ours, gemm, two_log_softmaxes, repeats=3)
    return {
        "score_tokens_per_second_head_only": 1024 / mine,
        "score_over_gemm": bare / mine,
        "score_over_two_log_softmaxes": full / mine,
        "score_extra_mib": extra,
    }


def bench_order() -> dict:
    from curriculum.order import build_order
    from curriculum.schedules import parse

    rng = np.random.default_rng(0)
    values, length = rng.standard_normal(1_000_000), rng.integers(100, 1024, 1_000_000, dtype=np.int32)
    schedule = parse("then(fold(5), random, tau=0.2)")
    ours, argsort = seconds(lambda: build_order(values, length, schedule, 64, 0), lambda: np.argsort(values), repeats=3)
    return {"order_seconds_per_million_segments": ours, "order_time_over_argsort": ours / argsort}


def bench_loader() -> dict:
    from curriculum.loader import Stream, batches
    from data.segments import corpus_segments
    from data.shards import open_corpus, write_shard

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50256, 50_000_000, dtype=np.uint16)
    tokens[np.cumsum(rng.geometric(1 / 690, 65_000))] = 50256
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "bench_train_000000.bin", tokens)
        corpus = open_corpus(folder, quiet=True)
        segments = corpus_segments(corpus, 1024)
        ids = rng.permutation(len(segments))
        begin = time.perf_counter()
        stream = Stream(corpus, segments, ids)
        next(batches(stream, 262_144, 8, steps=1))
        first = time.perf_counter() - begin
        steps = stream.num_tokens // 262_144
        begins, lengths = segments.start_N[ids].tolist(), segments.length_N[ids].tolist()

        def ours():
            for _ in batches(stream, 262_144, 8, steps=steps):
                pass

        def gather():
            np.concatenate([tokens[a : a + n] for a, n in zip(begins, lengths, strict=True)])

        mine, bare = seconds(ours, gather, repeats=3)
    return {
        "loader_tokens_per_second": steps * 262_144 / mine,
        "loader_over_gather": bare / mine,
        "loader_first_batch_seconds": first,
    }


def bench_trainer() -> dict:
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        say = dict(cwd=root, check=True, stdout=subprocess.DEVNULL)
        shards = ["--out", f"{folder}/shards", "--tokens", "300000"]
        subprocess.run([sys.executable, "-m", "data.sample", *shards], **say)
        settings = ["--data.shards", f"{folder}/shards", "--run.out_dir", f"{folder}/run", "--run.log_every", "4"]
        steps = ["--run.steps", "36", "--data.val_every", "36"]
        subprocess.run([sys.executable, "train_gpt.py", "configs/demo.toml", *settings, *steps], **say)
        rows = [r for r in read_run(Path(folder) / "run").rows if "train_nats" in r]
    spent = rows[-1]["time_s"] - rows[0]["time_s"]  # the first rows pay for warming up
    waited = rows[-1]["wait_s"] - rows[0]["wait_s"]
    return {
        "demo_tokens_per_second": (rows[-1]["tokens"] - rows[0]["tokens"]) / spent,
        "loader_wait_over_step": waited / spent,
    }


BENCHES: dict[str, Callable[[], dict]] = {
    "prepare": bench_prepare,
    "segments": bench_segments,
    "score": bench_score,
    "order": bench_order,
    "loader": bench_loader,
    "trainer": bench_trainer,
}


if __name__ == "__main__":
    command(main)
