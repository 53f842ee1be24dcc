"""What each technique of a preset is worth: the preset as it is, and once without each technique it has.

    python train_gpt.py --ablate configs/small_speed.toml --run.num_seeds 3

Runs are ordinary run folders below runs/<name>-ablation (or run.out_dir): a finished one is not run again, so the
command can be stopped and started. The table goes there as table.md, worst loss first: what is missed most.
All variants see the same tokens in the same order and are compared under one protocol, documents with a mask.
"""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from curriculum.config import Config, validate
from curriculum.records import read_run
from data.cli import InputError
from data.files import write_text

# Technique -> the settings without it. A variant is run where that differs from the preset.
WITHOUT: dict[str, dict[str, object]] = {
    "document mask": {"data.unit": "window"},
    "windows": {"model.window": 0, "model.short_window": 0, "model.window_schedule": ()},
    "short windows": {"model.short_window": 0},
    "window warm-up": {"model.window_schedule": ()},
    "value embeddings": {"model.num_value_embeds": 0},
    "x0 mixing": {"model.x0_mix": False},
    "skip connection": {"model.skip": False},
    "backout": {"model.backout": False},
    "partial key offset": {"model.key_offset": False},
    "softcap": {"model.softcap": 0.0},
    "smear": {"model.smear": False},
    "attention gate": {"model.attention_gate": False},
    "prediction of many tokens": {"model.mtp_weights": ()},
    "tied embedding": {"model.tie_frac": 0.0},
    "Polar Express": {"optim.muon_coefficients": "jordan"},
    "NorMuon": {"optim.normuon_beta": 0.0},
    "cautious weight decay": {"optim.cautious": False},
    "momentum schedule": {"optim.momentum_warmup_frac": 0.0, "optim.momentum_cooldown_frac": 0.0},
    "Adam every other step": {"optim.adam_every": 1},
    "floor of the learning rate": {"optim.floor": 0.0},
    "averaged weights": {"optim.average_frac": 0.0, "optim.average_decay": 0.0},
    "batch-size schedule": {"data.batch_schedule": ()},
    "sequence-length schedule": {"data.seq_schedule": ()},
}


def variants(cfg: Config) -> dict[str, Config]:
    """The preset under "nothing", and one config for each technique it has, under the technique's name."""
    if cfg.data.order:
        raise InputError("--ablate runs the stock order, in documents and in windows: leave data.order out")
    found = {"nothing": cfg}
    for technique, settings in WITHOUT.items():
        tables = cfg.model_dump()
        for setting, value in settings.items():
            table, name = setting.split(".")
            tables[table][name] = value
        other = validate(tables, f"without {technique}")
        if other != cfg:
            found[technique] = other
    return found


def ablate(cfg: Config, train: Callable[[Config], bool], leads: bool) -> None:
    """Run every variant with every seed; write and print the table. Stops early, and says so, when time is up."""
    base = Path(cfg.run.out_dir or f"runs/{cfg.run.name}-ablation")
    seeds = range(cfg.run.seed, cfg.run.seed + cfg.run.num_seeds)
    results: dict[str, list[dict]] = {}
    for technique, variant in variants(cfg).items():
        slug = technique.replace(" ", "-")
        place = base / slug / "seed{seed}"
        run = variant.run.model_copy(update=dict(name=f"{cfg.run.name}-without-{slug}", out_dir=str(place)))
        if not train(variant.model_copy(update={"run": run})):
            if leads:
                print(f"{base}: stopped at the variant without {technique}; the same command continues")
            return
        results[technique] = [read_run(Path(str(place).format(seed=seed))).rows for seed in seeds] if leads else []
    if leads:
        text = table(cfg, results)
        write_text(base / "table.md", text)
        print(f"{text}\ntable: {base / 'table.md'}")


def table(cfg: Config, results: dict[str, list[list[dict]]]) -> str:
    """Markdown. `results` holds the rows of metrics.jsonl of every seed of every variant."""
    finals = {name: [rows[-1]["documents_nats"] for rows in runs] for name, runs in results.items()}
    speeds = {
        name: statistics.median(row["tokens_per_second"] for rows in runs for row in rows if "tokens_per_second" in row)
        for name, runs in results.items()
    }
    base = finals["nothing"]
    tokens = results["nothing"][0][-1]["tokens"]
    lines = [
        f"{cfg.run.name}: validation loss (nats, documents with mask) after {tokens:,} tokens, n = {len(base)} seeds; "
        "difference with its standard error",
        "",
        "| without | loss | sd | difference | tokens/s |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, values in sorted(finals.items(), key=lambda item: -statistics.mean(item[1])):
        several = len(values) > 1
        sd = f"{statistics.stdev(values):.4f}" if several else ""
        error = math.hypot(*(statistics.stdev(x) / math.sqrt(len(x)) for x in (values, base))) if several else 0
        difference = statistics.mean(values) - statistics.mean(base)
        shown = "" if name == "nothing" else f"{difference:+.4f}" + (f" ± {error:.4f}" if several else "")
        lines.append(f"| {name} | {statistics.mean(values):.4f} | {sd} | {shown} | {speeds[name]:,.0f} |")
    return "\n".join(lines) + "\n"
