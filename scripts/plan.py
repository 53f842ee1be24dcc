"""What a run will do, before it is done. The trainer's own command line, with another program in front:

    python -m scripts.plan configs/demo.toml --data.order orders/fold5-0.npy

prints tokens, steps and epochs, when each bin is used up, how crowded with documents the batches get, what will be read
from disk, and how long it will take at the speed last measured for this model; and refuses, in the trainer's words,
what the trainer would refuse. Nothing is allocated and nothing is written.
"""

import json
from pathlib import Path

import numpy as np

from curriculum.config import Config, parse_args
from data.cli import guarded

CROWDED = 0.9  # of the most documents in any micro-batch


def main() -> None:
    cfg = parse_args()
    for name, value in plan(cfg).items():
        print(f"{name:18}{value}")


def plan(cfg: Config) -> dict[str, str]:
    """One line for each thing worth knowing. Raises InputError on what cannot work."""
    from curriculum.loader import documents_of_parts
    from curriculum.order import load_order
    from curriculum.runs import prepare

    notes: list[str] = []
    work = prepare(cfg, notes.append)
    used, held = work.plan.begin_S[-1], work.train.num_tokens
    sizes_S = np.diff(work.plan.begin_S)
    told = {
        "run": f"{cfg.run.name}, seed {cfg.run.seed}",
        "order": f"{held:,} tokens in {len(work.train.ids):,} segments ({cfg.data.order or 'stock'})",
        "steps": f"{work.steps:,} of {several(sizes_S)} tokens, {several(work.plan.parts_S)} micro-batches each",
        "tokens": f"{used:,}, {used / held:.1%} of the order",
    }
    if cfg.data.order:
        told |= of_bins(load_order(cfg.data.order).manifest, used / held)
    documents_P = documents_of_parts(work.train, work.plan)
    crowded = int(np.count_nonzero(documents_P >= CROWDED * documents_P.max()))
    told["documents"] = (
        f"{documents_P.mean():.1f} in a micro-batch, at most {documents_P.max()}; "
        f"{crowded:,} of {len(documents_P):,} micro-batches hold {CROWDED:.0%} of that or more"
    )
    told["disk"] = f"{2 * used / 1e9:.3g} GB of tokens from {len(work.corpus.paths)} shards"
    told["validation"] = f"{work.val_tokens:,} tokens every {cfg.data.val_every} steps"
    told["time"] = duration(used, *last_speed(cfg))
    told |= {f"note {i}": note.removeprefix("note: ") for i, note in enumerate(notes, 1)}
    return told


def several(values_S: np.ndarray) -> str:
    """A number, or the range of several; the last batch may hold what is left."""
    low, high, last = values_S[:-1].min(initial=values_S[0]), values_S.max(), values_S[-1]
    body = f"{high:,}" if low == high else f"{low:,} to {high:,}"
    return body if last >= low else f"{body} (the last {last:,})"


def of_bins(about: dict, share: float) -> dict[str, str]:
    """What becomes of the bins in the first `share` of an order, by its manifest."""
    tokens_CS = np.array(about["composition"]) * about["num_tokens"] / len(about["composition"])
    cells = len(tokens_CS)
    given_CS = np.cumsum(tokens_CS, axis=0)
    at = min(round(share * cells), cells)
    uses = about["num_tokens"] / (about["coverage"] * sum(about["bin_tokens"]))
    left = 1 - given_CS[at - 1] / np.maximum(given_CS[-1], 1) if at else np.ones(tokens_CS.shape[1])
    end_S = 1 - np.argmax(tokens_CS[::-1] > 0, axis=0) / cells  # of the last cell that holds any of the bin
    end_S[given_CS[-1] == 0] = 0
    first, last = int(np.argmin(end_S)), int(np.argmax(end_S))
    told = dict(
        epochs=f"{uses:.3g} uses of a segment on average, at most {about['most_repeats']}",
        bins=f"{len(end_S)} of {about['measure']}; bin {first} ends first, at {end_S[first]:.2f} of the order, "
        f"bin {last} last, at {end_S[last]:.2f}",
    )
    if about["omitted_segments"]:
        told["epochs"] += f"; {about['omitted_segments']:,} segments are never used"
    if share < 1 and left.max() - left.min() > 0.01:
        told["unused"] = (
            f"bin {int(np.argmax(left))} keeps {left.max():.0%} of its tokens, bin {int(np.argmin(left))} "
            f"{left.min():.0%}: arms that stop here train on other tokens"
        )
    return told


def last_speed(cfg: Config, runs: Path = Path("runs")) -> tuple[float | None, str]:
    """Tokens per second of the newest run with this model and batch under `runs`, and where that was measured."""
    wanted = cfg.model_dump(mode="json")
    newest = sorted(runs.rglob("metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest:
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            first, timed = rows[0], [row for row in rows[1:] if row.get("time_s")]
            same = all(
                first["config"][table][key] == wanted[table][key]
                for table, keys in (
                    ("model", wanted["model"]),
                    ("data", ("batch_tokens", "micro_batch_tokens", "seq_len")),
                )
                for key in keys
            )
            if same and timed:
                device = f"{first['hardware']['device']}, {first['processes']} process(es)"
                return timed[-1]["tokens"] / timed[-1]["time_s"], f"measured by {path.parent} on {device}"
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue  # a half-written or foreign record says nothing about speed
    return None, f"no run of this model under {runs}/ to take a speed from"


def duration(tokens: int, tokens_per_second: float | None, source: str) -> str:
    if tokens_per_second is None:
        return f"unknown: {source}"
    minutes = tokens / tokens_per_second / 60
    shown = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.1f} min"
    return f"{shown} without validation, at {tokens_per_second:,.0f} tokens/s ({source})"


if __name__ == "__main__":
    guarded(main)
