"""The transfer probe: before a big sweep, can any schedule over these bins help at all, at this point of training?

    python train_gpt.py CONFIG --data.order orders/random-0.npy --run.out_dir runs/parent --run.save_at 0.05 0.3 0.7
    python -m scripts.probe runs/parent --scores scores/english --measure entropy --bins 4 --tokens 65536 --slots 2

From every checkpoint that the parent kept, short runs branch off: one on each bin alone and one on the i.i.d. mix, each
with several seeds. A branch begins with the checkpoint's weights and optimizer state and keeps the learning rates and
momentum the parent had there; it trains on segments that neither the parent had seen by then nor any other branch of
that checkpoint sees. All branches train on the same number of tokens.

    G[i, j] = how far training on bin j lowers the validation loss of bin i (nats), with its error over seeds

and a verdict for each checkpoint: yes, no or unclear. `curriculum/probe.py` says what these mean; all of it is written
to probe.json. The same command continues a probe that was stopped; more --seeds are added to those that are there.
"""

import json
import math
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curriculum.config import Config, stage, validate
from curriculum.probe import LEAST, judge, means, p_constant
from curriculum.records import read_run
from data.cli import InputError, command
from data.files import read_json, write_json, write_text
from scripts.sweep import Arm, Run, as_toml, final_loss, hold, machine_for, work_off

MIX = "mix"


def main(
    run: Path,
    /,
    scores: Path,
    measure: str = "entropy",
    bins: int = 4,
    tokens: int = 0,
    seeds: int = 4,
    least: float = LEAST,
    out: Path | None = None,
    gpus: tuple[int, ...] = (),
    gpus_per_run: int = 1,
    slots: int = 0,
    threads: int = 0,
) -> None:
    """Measure what training on each bin does to the loss on every bin, from each kept checkpoint of a run.

    Args:
        run: folder of a run with kept checkpoints (step<k>.pt, see run.save_at).
        scores: folder written by curriculum.score, of the run's shards and validation shards.
        measure: by which segments are binned.
        bins: number of bins of equal tokens, 2 or more; (bins + 1) x seeds branches for each checkpoint.
        tokens: of a branch; rounded down to whole batches of the run. 0 means 16 batches.
        seeds: of every branch: fresh segments each, 4 or more.
        least: share of the mix's drop below which a gain is not worth having.
        out: where the branches go; <run>-probe unless given.
        gpus: the GPUs to use; none means the CPU.
        gpus_per_run: GPUs of one branch (torchrun if several).
        slots: branches at a time, on the CPU; 0 means one.
        threads: CPU threads of a branch; 0 means the cores shared out over the slots.
    """
    if bins < 2 or seeds < 4 or tokens < 0 or not 0 < least < 1:
        raise InputError(
            f"--bins {bins}, --seeds {seeds}, --tokens {tokens}, --least {least}: expected 2, 4 and 0 or more, and a "
            "share between 0 and 1"
        )
    machine = machine_for("local", gpus, gpus_per_run, slots, threads)
    parent = open_parent(run)
    out = out or run.with_name(f"{run.name}-probe")
    with hold(out):
        asked = dict(parent=parent.identity, measure=measure, bins=bins, tokens=tokens)
        asked = json.loads(json.dumps(asked))
        if (memory := out / "asked.json").exists() and read_json(memory) != asked:
            raise InputError(f"{out}: holds a probe of another run, measure, bins or tokens; choose another --out")
        write_json(memory, asked)
        layout = lay_out(out, scores, measure, bins, parent)
        branches = {point: branch_off(out, point, parent, layout, tokens, seeds) for point in parent.points}
        everything = [branch for of_point in branches.values() for branch in of_point]
        todo = [branch for branch in everything if final_loss(branch.folder) is None]
        print(f"{run}: {len(parent.points)} checkpoints, {len(everything)} branches, {len(todo)} to go; in {out}")
        if failed := work_off(todo, machine, out) if todo else {}:
            raise InputError("; ".join(f"branch {name} failed: {why}" for name, why in failed.items()))
        found = {point: drops(of_point, bins, seeds) for point, of_point in branches.items()}
        write_json(out / "probe.json", tell(found, least, asked))
    print(f"\n{out / 'probe.json'}")


# ----------------------------------------------------------------------------------------------------------------------
# The parent, and what is left to train on


class Point(NamedTuple):
    """A kept checkpoint."""

    path: Path
    step: int
    progress: float
    tokens: int  # the parent has trained on so many


class Parent(NamedTuple):
    cfg: Config
    identity: dict
    points: list[Point]
    segments_sha256: str
    ids_N: np.ndarray  # segments in the parent's order
    start_N: np.ndarray  # tokens before each of them


def open_parent(run: Path) -> Parent:
    """Raises InputError if the run has no kept checkpoint to branch from, or one that cannot be branched from."""
    from curriculum import runs

    stored = read_json(run / "config.json")
    cfg = validate(stored["config"], str(run / "config.json"))
    if cfg.model.tie_frac:
        raise InputError(f"{run}: its embedding and head are tied for a while; such a run cannot be branched from")
    work = runs.prepare(cfg, lambda _: None)
    if work.pool:
        raise InputError(f"{run}: drew its data as it went; probe a run on its replay (curriculum.adaptive)")
    begin_S, points = work.plan.begin_S, []
    for path in sorted(run.glob("step*.pt"), key=lambda path: int(path.stem[4:])):
        step = int(path.stem[4:])
        progress = float(begin_S[step] / begin_S[-1])
        if cfg.optim.lr_scale(progress) > 0:
            points.append(Point(path, step, progress, int(begin_S[step])))
    if not points:
        raise InputError(f"{run}: no kept checkpoint before its end; train it with --run.save_at 0.05 0.3 0.7")
    start_N = np.concatenate([[0], work.train.end[:-1]])
    identity = {key: stored["identity"][key] for key in ("digest", "seed", "order_sha256")}
    return Parent(cfg, identity, points, work.identity["segments_sha256"], np.asarray(work.train.ids), start_N)


class Layout(NamedTuple):
    path: Path  # an order of the whole corpus: its manifest ties bins to scores and shards
    manifest: dict
    bin_N: np.ndarray  # of every segment of the corpus
    length_N: np.ndarray


def lay_out(out: Path, scores: Path, measure: str, bins: int, parent: Parent) -> Layout:
    """Bins of all scored segments. Raises InputError if they are not those the parent was trained on."""
    from curriculum import order
    from curriculum.score import read_scores

    path = out / "layout.npy"
    table = read_scores(scores)
    if table.segments.digest() != parent.segments_sha256:
        raise InputError(f"{scores}: scores of other shards, or of other segments, than the run was trained on")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    try:
        loaded = order.load_order(path)
    except InputError:
        for part in out.glob("layout.*"):
            part.unlink()
        with open(out / "logs" / "orders.log", "a", encoding="utf-8") as log, redirect_stdout(log):
            order.main(scores=scores, out=path, measure=measure, bins=bins)
        loaded = order.load_order(path)
    if "val_bins_sha256" not in loaded.manifest:
        raise InputError(f"{scores}: no tables of validation shards there: the loss on each bin cannot be measured")
    return Layout(path, loaded.manifest, order.sorted_pool(loaded, table).bin_P, table.segments.length_N)


def branch_off(out: Path, point: Point, parent: Parent, layout: Layout, tokens: int, seeds: int) -> list[Run]:
    """The branches of a checkpoint, by arm and seed: configs and orders are written where they are missing."""
    cfg = branch_config(parent.cfg, point, tokens)
    wanted = cfg.run.steps * cfg.data.batch_tokens
    config = out / "configs" / f"step{point.step}.toml"
    write_text(config, as_toml(cfg))
    pieces = draw(point, parent, layout, wanted, seeds)
    found = []
    for (arm, seed), ids in pieces.items():
        name = f"step{point.step}-{arm}"
        path = out / "orders" / f"{name}-{seed}.npy"
        about = dict(schedule=f"probe({arm})", multiset="probe", seed=seed, budget_tokens=wanted)
        if not path.with_suffix(".json").exists():
            write_order(path, ids, layout, about)
        described = Arm(name, layout.manifest["measure"], about["schedule"], layout.manifest["bins"])
        found.append(Run(described, path, config, seed, out / name / f"seed{seed}"))
    return found


def write_order(path: Path, ids: np.ndarray, layout: Layout, about: dict) -> None:
    """An order of these segments with the layout's bins, its manifest last."""
    from curriculum import order

    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(order.val_path(layout.path), order.val_path(path))
    hashes = ("version", "order_sha256", "multiset_sha256", "recipe")
    manifest = {key: value for key, value in layout.manifest.items() if key not in hashes} | about
    manifest |= dict(num_segments=len(ids), num_tokens=int(layout.length_N[ids].sum()))
    order.save_order(path, ids, manifest)


def branch_config(cfg: Config, point: Point, tokens: int) -> Config:
    """The parent's config with every schedule standing still where the checkpoint was kept.

    Losses of further tokens ahead and shortened documents are left out: what is probed is the plain loss.
    """
    progress, optim, model = point.progress, cfg.optim, cfg.model
    batch_share = stage(cfg.data.batch_schedule, progress)
    scale = optim.lr_scale(progress) * batch_share**0.5
    batch_tokens = round(batch_share * cfg.data.batch_tokens)
    steps = tokens // batch_tokens if tokens else 16
    if steps < 1:
        raise InputError(f"--tokens {tokens}: less than one batch of {batch_tokens} tokens")
    window_share = stage(model.window_schedule, progress)
    tables = cfg.model_dump()
    tables["run"] |= dict(init_from=str(point.path), name="probe", steps=steps, out_dir="", save_at=(), max_seconds=0.0)
    tables["run"] |= dict(num_seeds=1, target_nats=0.0, wandb="off", tensorboard=False, checkpoint_seconds=1e9)
    tables["data"] |= dict(order="", batch_tokens=batch_tokens, batch_schedule=(), seq_schedule=())
    tables["data"] |= dict(val_every=steps, val_every_late=0)
    tables["optim"] |= {lr: getattr(optim, lr) * scale for lr in ("muon_lr", "embed_lr", "head_lr", "scalar_lr")}
    tables["optim"] |= dict(warmup_frac=0.0, cooldown_frac=0.0, average_frac=0.0)
    tables["optim"] |= dict(
        muon_momentum=optim.momentum(progress), momentum_warmup_frac=0.0, momentum_cooldown_frac=0.0
    )
    tables["model"] |= dict(mtp_weights=(), window_schedule=())
    tables["model"] |= {name: math.ceil(getattr(model, name) * window_share) for name in ("window", "short_window")}
    return validate(tables, "the branch's config")


def draw(point: Point, parent: Parent, layout: Layout, tokens: int, seeds: int) -> dict[tuple[str, int], np.ndarray]:
    """Segments of every branch, (arm, seed) -> ids: at least `tokens` each, none of them twice, none seen before.

    A bin's branches take from one end of its shuffled rest, those of the mix from the other, a seed after the other:
    what a branch gets does not depend on how many seeds there are.
    """
    seen = parent.ids_N[: np.searchsorted(parent.start_N, point.tokens)]
    unseen_N = np.ones(len(layout.bin_N), bool)
    unseen_N[seen] = False
    bins = layout.manifest["bins"]
    pieces: dict[tuple[str, int], np.ndarray] = {}
    mixed: list[list[np.ndarray]] = [[] for _ in range(seeds)]
    for b in range(bins):
        stream = np.random.default_rng([point.step, b])
        rest = stream.permutation(np.flatnonzero(unseen_N & (layout.bin_N == b)))
        own = cut_off(rest, layout.length_N, tokens, seeds)
        of_mix = cut_off(rest[::-1], layout.length_N, -(-tokens // bins), seeds)
        if own is None or of_mix is None or sum(map(len, own + of_mix)) > len(rest):
            held, needed = int(layout.length_N[rest].sum()), seeds * (tokens + tokens // bins)
            raise InputError(
                f"{point.path}: bin {b} holds {held:,} tokens that the run had not seen; {seeds} seeds of {tokens:,} "
                f"tokens and its share of the mix need {needed:,}: take fewer --seeds, --tokens or --bins"
            )
        pieces |= {(f"bin{b}", seed): ids for seed, ids in enumerate(own)}
        for seed, ids in enumerate(of_mix):
            mixed[seed].append(ids)
    for seed, parts in enumerate(mixed):
        stream = np.random.default_rng([point.step, bins, seed])
        pieces[MIX, seed] = stream.permutation(np.concatenate(parts))
    return pieces


def cut_off(ids: np.ndarray, length_N: np.ndarray, tokens: int, pieces: int) -> list[np.ndarray] | None:
    """The first `pieces` runs of `ids` that hold at least `tokens` tokens each; None if there are not so many.

    >>> cut_off(np.array([2, 0, 1, 3]), np.array([3, 3, 5, 3]), 4, 2)
    [array([2]), array([0, 1])]
    """
    end, begin, found = np.cumsum(length_N[ids], dtype=np.int64), 0, []
    for _ in range(pieces):
        before = end[begin - 1] if begin else 0
        last = int(np.searchsorted(end, before + tokens))
        if last >= len(ids):
            return None
        found.append(ids[begin : last + 1])
        begin = last + 1
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What came out


def drops(branches: list[Run], bins: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """How far each branch lowered the loss of every validation bin, (R, A, V), and of all of them, (R, A)."""
    by_bin_RAV, whole_RA = np.empty((seeds, bins + 1, bins)), np.empty((seeds, bins + 1))
    arms = [*(f"bin{b}" for b in range(bins)), MIX]
    for branch in branches:
        validated = [row for row in read_run(branch.folder).rows if "val_nats" in row]
        first, last = validated[0], validated[-1]
        if first["step"] != 0:
            raise InputError(f"{branch.folder}: its first validation is at step {first['step']}, not before training")
        at = branch.seed, arms.index(branch.arm.name.rpartition("-")[2])
        whole_RA[at] = first["val_nats"] - last["val_nats"]
        # A bin without validation tokens has no loss: its row of G is NaN.
        by_bin_RAV[at] = np.array(first["bin_nats"], float) - np.array(last["bin_nats"], float)
    return by_bin_RAV, whole_RA


def tell(found: dict[Point, tuple[np.ndarray, np.ndarray]], least: float, asked: dict) -> dict:
    """Print G and the verdict of every checkpoint; returns what probe.json holds."""
    told = []
    for point, (by_bin_RAV, whole_RA) in found.items():
        mean_AV, error_AV = means(by_bin_RAV)
        verdict = judge(whole_RA, least)
        arms = [*(f"bin {b}" for b in range(mean_AV.shape[1])), MIX]
        print(f"\nstep {point.step}, {point.progress:.0%} of the run: drop of the loss (nats) on each bin, by what is")
        print(f"trained on; +- standard error over {len(whole_RA)} seeds\n")
        print(" " * 8 + "".join(f"{arm:>18}" for arm in arms))
        for b in range(mean_AV.shape[1]):
            cells = (f"{mean_AV[a, b]:+.4f} +- {error_AV[a, b]:.4f}" for a in range(len(arms)))
            print(f"bin {b:<4}" + "".join(f"{cell:>18}" for cell in cells))
        mean_A, error_A = whole_RA.mean(0), whole_RA.std(0, ddof=1) / np.sqrt(len(whole_RA))
        print("all     " + "".join(f"{f'{m:+.4f} +- {e:.4f}':>18}" for m, e in zip(mean_A, error_A, strict=True)))
        print(f"\n{in_words(verdict, least)}")
        told.append(
            dict(
                step=point.step,
                progress=point.progress,
                G=as_json(mean_AV.T),
                G_error=as_json(error_AV.T),
                drop_by_seed=as_json(whole_RA),
                answer=verdict.answer,
                mix_nats=verdict.mix_nats,
                least_nats=verdict.least_nats,
                judged=verdict.judged._asdict() | dict(mixture_B=as_json(verdict.judged.mixture_B)),
                flattered=verdict.flattered._asdict() | dict(mixture_B=as_json(verdict.flattered.mixture_B)),
            )
        )
    p = p_constant([whole_RA for _, whole_RA in found.values()]) if len(found) > 1 else None
    if p is not None:
        print(f"\nThat the bins' worth is the same at all {len(found)} points: p = {p:.3g}. An exact order, which uses")
        print("every bin once, can gain (in the short run) only where that is not so.")
    return dict(asked=asked, least=least, points=told, p_constant=p)


def as_json(values: np.ndarray) -> list:
    """NaN, which JSON has not, as null."""
    return np.where(np.isnan(values), None, values.astype(object)).tolist()


def in_words(verdict, least: float) -> str:
    judged, flattered = verdict.judged, verdict.flattered
    shares = " ".join(f"{share:.2f}" for share in judged.mixture_B)
    tried = f"the mixture [{shares}], chosen on half of the seeds, gains {judged.nats:+.4f} nats on the other half"
    limit = f"at most {flattered.high:.4f} nats are there for any mixture (95 %)"
    worth = f"{least:.0%} of the mix's own drop are {verdict.least_nats:.4f}"
    match verdict.answer:
        case "yes":
            return f"yes: {tried}, at least {judged.low:+.4f} (95 %); {worth}."
        case "no":
            return f"no: {limit}, and {worth}; {tried}."
    return f"unclear: {tried} ({judged.low:+.4f} at least, 95 %), and {limit}; {worth}: take more seeds or tokens."


if __name__ == "__main__":
    command(main)
