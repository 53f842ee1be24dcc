"""The adaptive arm: a run draws more from the bins it learns most from. The one thing a static order cannot do.

    python -m curriculum.order --scores scores/ --schedule "adaptive(progress)" --bins 16 --out orders/adaptive-0.npy
    python train_gpt.py configs/demo.toml --data.order orders/adaptive-0.npy --run.name adaptive --run.steps 500
    python -m curriculum.adaptive runs/adaptive-0123456789ab/seed0 --out orders/replay-0.npy

**The order file** holds a pool of segments, every bin's shuffled stream, interleaved evenly: an order as it would be if
no bin ever stood out. A static reader may take it for that. The trainer, told by the manifest, draws from the streams.

**Progress** of a bin over a stretch, from one validation to the next: the drop of its loss on held-out text of the same
bin, nats a token. (The self-prediction gain of Graves et al., "Automated Curriculum Learning for Neural Networks", ICML
2017, over a stretch instead of a batch, and on held-out text.) Its reward is how far it is ahead of the pool's mean
progress, over the largest such distance of any bin: -1 to 1 at every decision, however flat the loss has become.

**Weights** are those of EXP3.S (Auer et al., SIAM J. Comput. 2002): times exp(eta reward), then a `share` of all is
dealt out anew by the bins' tokens, so that what was learned long ago is forgotten and no weight can vanish. As every
bin's loss is measured whatever was drawn, rewards need not be divided by the probability of having looked: the full-
information form, known as fixed share (Herbster & Warmuth, Machine Learning 1998). What is drawn of a bin is `floor`
of its share of the pool and, of the rest, its weight. Bins begin with their share of the pool; the first stretch has
nothing to compare with, so the second has the same weights.

**Drawing.** Between validations streams are interleaved as in any order, by when the middle of a segment falls due. A
bin that is owed tokens has them carried over to the next stretch: on the floor it is drawn at last, however short the
stretches. A bin that is used up is closed and the others share what it would have had: nothing is repeated that the
order does not repeat. So a run over the whole pool (run.steps 0) trains on the tokens of every other order of it, each
as often, and may only choose when; its late stretches hold what was left. A shorter run chooses which: that is
selection, and counts as such. Give it a pool of some times its tokens.

**Written down.** All of it follows from the order file and the losses at validations. These are in every checkpoint, so
a run that was killed goes on as if it had not been, with any number of processes. For every stretch metrics.jsonl has a
row: bin_weights (the shares drawn), bin_rewards, and the hash of drawn/<step>.npy, the ids. `main` joins these into a
static order; training on it with the same settings gives the same losses.

    S bins   M segments of a stretch   N segments of the pool, each as often as the order has it
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curriculum.loader import Plan, Stream
from data.cli import InputError, command
from data.files import atomic_path

DIGITS = 6  # of a loss in nats that count: the last bits of a sum depend on how many processes added it up
FEWEST_DECISIONS = 2
ADAPTIVE = 4  # purpose of the random stream of ties; 0 to 3 are those of curriculum.order


# ----------------------------------------------------------------------------------------------------------------------
# The rule


class Rule(NamedTuple):
    eta: float  # how strongly a reward counts
    share: float  # of all weight, dealt out anew at each decision
    floor: float  # least share of a bin in what is drawn, over its share of the pool


def rewards(before_S: Sequence[float], after_S: Sequence[float], mass_S: np.ndarray) -> np.ndarray:
    """How far every bin's loss fell, against the mean by `mass_S`, over the largest distance from it.

    >>> rewards([4.0, 4.0, 4.0], [3.0, 3.5, 4.0], np.full(3, 1 / 3))
    array([ 1.,  0., -1.])
    """
    drop_S = np.round(before_S, DIGITS) - np.round(after_S, DIGITS)
    ahead_S = drop_S - (mass_S * drop_S).sum()
    largest = np.abs(ahead_S).max()
    return ahead_S / largest if largest > 10.0**-DIGITS else np.zeros(len(mass_S))


def learned(weight_S: np.ndarray, reward_S: np.ndarray, mass_S: np.ndarray, rule: Rule) -> np.ndarray:
    """The weights after a decision.

    >>> learned(np.array([0.5, 0.5]), np.array([1.0, -1.0]), np.array([0.5, 0.5]), Rule(1.0, 0.0, 0.1)).round(3)
    array([0.881, 0.119])
    """
    grown_S = weight_S * np.exp(rule.eta * reward_S)
    return (1 - rule.share) * grown_S / grown_S.sum() + rule.share * mass_S


def drawn_shares(weight_S: np.ndarray, open_S: np.ndarray, mass_S: np.ndarray, rule: Rule) -> np.ndarray:
    """What is drawn of every bin in the next stretch: shares that sum to 1, of closed bins nothing.

    >>> drawn_shares(np.array([1.0, 0.0]), np.array([True, True]), np.array([0.5, 0.5]), Rule(1.0, 0.0, 0.2))
    array([0.9, 0.1])
    """
    wanted_S = np.where(open_S, rule.floor * mass_S + (1 - rule.floor) * weight_S, 0.0)
    return wanted_S / wanted_S.sum()


# ----------------------------------------------------------------------------------------------------------------------
# The streams of the bins


class Streams:
    """Every bin's segments in the sequence of its stream, and how far each has been drawn."""

    def __init__(self, id_N: np.ndarray, bin_N: np.ndarray, length_N: np.ndarray):
        self.ids, self.end, self.middle = [], [], []
        for b in range(int(bin_N.max()) + 1):
            here = np.flatnonzero(bin_N == b)
            end = np.cumsum(length_N[here], dtype=np.int64)
            self.ids.append(id_N[here])
            self.end.append(np.concatenate([[0], end]))
            self.middle.append(end - length_N[here] / 2)
        self.used_S = np.zeros(len(self.ids), np.int64)  # segments
        self.owed_S = np.zeros(len(self.ids))  # tokens asked for and not drawn yet; they sum to 0

    @property
    def tokens_S(self) -> np.ndarray:
        """Of the whole streams."""
        return np.array([end[-1] for end in self.end])

    @property
    def open_S(self) -> np.ndarray:
        return self.used_S < [len(ids) for ids in self.ids]

    def take(self, share_S: np.ndarray, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
        """The next segments, as few as hold `num_tokens`, a share of each bin: ids (M,). There must be as many left.

        The middle of a segment falls due once its bin has been asked for the tokens before it: emission times as in
        curriculum.order, for weights that stand still, and counted in tokens.
        """
        bins = range(len(self.ids))
        given_S = np.array([self.end[b][self.used_S[b]] for b in bins])
        horizon = float(num_tokens)
        while True:
            limit_S = given_S + self.owed_S + horizon * share_S
            stop_S = [max(self.used_S[b], np.searchsorted(self.middle[b], limit_S[b], side="right")) for b in bins]
            if sum(self.end[b][stop_S[b]] for b in bins) - given_S.sum() >= num_tokens:
                break
            assert any(stop_S[b] < len(self.ids[b]) for b in bins), "the pool holds fewer tokens"
            horizon *= 1.5  # bins have run out, or all fall a few tokens short
        due = [slice(self.used_S[b], stop_S[b]) for b in bins]
        id_M = np.concatenate([self.ids[b][due[b]] for b in bins])
        bin_M = np.repeat(bins, [stop_S[b] - self.used_S[b] for b in bins])
        length_M = np.concatenate([np.diff(self.end[b][self.used_S[b] : stop_S[b] + 1]) for b in bins])
        middle_M = np.concatenate([self.middle[b][due[b]] for b in bins])
        due_M = (middle_M - (given_S + self.owed_S)[bin_M]) / share_S[bin_M]
        at_M = np.lexsort((rng.random(len(due_M)), due_M))  # chance decides what falls due at the same moment
        at_M = at_M[: np.searchsorted(np.cumsum(length_M[at_M]), num_tokens) + 1]
        taken_S = np.bincount(bin_M[at_M], weights=length_M[at_M], minlength=len(bins))
        self.used_S += np.bincount(bin_M[at_M], minlength=len(bins))
        self.owed_S += share_S * taken_S.sum() - taken_S
        if (closed_S := ~self.open_S).any() and not closed_S.all():
            left_S = np.where(closed_S, 0.0, share_S)
            self.owed_S += left_S / left_S.sum() * self.owed_S[closed_S].sum()
            self.owed_S[closed_S] = 0.0
        return id_M[at_M]


# ----------------------------------------------------------------------------------------------------------------------
# A run


@dataclass(frozen=True)
class Pool:
    """What an adaptive run draws from and when it decides: all that is known before it begins."""

    order: Stream  # the order file as it is
    bin_N: np.ndarray  # of its entries
    rule: Rule
    seed: int  # of the order
    plan: Plan
    validated: list[int]  # steps after which losses are measured, the last step's at the end

    def most_documents(self) -> int:
        """No micro-batch holds more, whatever is drawn: as many as the shortest segments would make."""
        length_N = np.sort(self.order.segments.length_N[self.order.ids])
        part = int((np.diff(self.plan.begin_S) / self.plan.parts_S).max()) + 1
        shortest = int(np.searchsorted(np.cumsum(length_N, dtype=np.int64), part, side="right"))
        cap = int(self.plan.max_len_S.min())
        return shortest + 2 + (part // cap if cap < length_N[-1] else 0)


class Grown(Stream):
    """A stream that is known as far as it has been drawn."""

    def __init__(self, whole: Stream):
        super().__init__(whole.corpus, whole.segments, whole.ids[:0])

    def extend(self, ids: np.ndarray) -> None:
        end = self.num_tokens + np.cumsum(self.segments.length_N[ids], dtype=np.int64)
        self.ids, self.end = np.concatenate([self.ids, ids]), np.concatenate([self.end, end])
        self.num_tokens = int(self.end[-1])


class Course:
    """The course of one run: what it has drawn so far, and from what losses that follows.

    `history` is all there is to know of the past: [step, losses of the bins] at every validation before the last, the
    first entry [0, None]. `folder` is where ids are written down; None in a process that does not lead.
    """

    def __init__(self, pool: Pool, folder: Path | None, history: list | None = None):
        self.pool, self.folder, self.history = pool, folder, []
        self.stream = Grown(pool.order)
        self.streams = Streams(pool.order.ids, pool.bin_N, pool.order.segments.length_N[pool.order.ids])
        tokens_S = self.streams.tokens_S
        self.mass_S = self.weight_S = tokens_S / tokens_S.sum()
        for step, bin_nats in history or []:
            self.decide(step, bin_nats, again=True)

    def stretches(self, step: int) -> Iterator[range]:
        """Steps from `step` on, up to each validation. Ask for the next stretch when the losses before it are told."""
        for begin, end in pairwise([0, *self.pool.validated]):
            if step < end:
                assert self.stream.num_tokens >= self.pool.plan.begin_S[end], "not decided yet"
                yield range(max(step, begin), end)

    def decide(self, step: int, bin_nats: list[float] | None, again: bool = False) -> dict:
        """Take the losses after `step`, draw up to the next validation; what is to be said of it.

        `again`: as it was decided before a run was stopped; raises InputError if other segments come out.
        """
        before = self.history[-1][1] if self.history else None
        reward_S = np.zeros(len(self.mass_S))
        if before is not None:
            reward_S = rewards(before, bin_nats, self.mass_S)
            self.weight_S = learned(self.weight_S, reward_S, self.mass_S, self.pool.rule)
        share_S = drawn_shares(self.weight_S, self.streams.open_S, self.mass_S, self.pool.rule)
        end = self.pool.validated[np.searchsorted(self.pool.validated, step, side="right")]
        missing = int(self.pool.plan.begin_S[end]) - self.stream.num_tokens
        ids = self.stream.ids[:0]
        if missing > 0:  # else the segment that the stretch before ended in is longer than this one
            rng = np.random.default_rng([self.pool.seed, ADAPTIVE, len(self.history)])
            ids = self.streams.take(share_S, missing, rng)
            self.stream.extend(ids)
        self.history.append([step, bin_nats])
        if self.folder is not None:
            self.write_down(step, ids, again)
        return dict(
            bin_weights=share_S.tolist(),
            bin_rewards=reward_S.tolist() if before is not None else None,
            drawn_segments=len(ids),
            drawn_sha256=sha256(ids),
        )

    def write_down(self, step: int, ids: np.ndarray, again: bool) -> None:
        path = drawn_path(self.folder, step)
        if again and path.exists() and not np.array_equal(np.load(path), ids):
            raise InputError(
                f"{path}: other segments than are drawn now from the same losses: the code or the order has changed "
                "since; go on with the old code, or remove the run folder to start again"
            )
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, ids)


def drawn_path(folder: Path, step: int) -> Path:
    """The ids that a run has drawn at its validation after `step`."""
    return folder / "drawn" / f"{step:08}.npy"


def sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids).data).hexdigest()


def open_pool(path: str, manifest: dict, whole: Stream, plan: Plan, validated: list[int], val: np.ndarray) -> Pool:
    """What a run on the adaptive order at `path` draws from. `val` holds each bin's validation tokens, () if unknown.

    Raises InputError if there is not enough to decide by.
    """
    from curriculum.order import bins_path, load_hashed

    if not len(val):
        raise InputError(
            f"{path}: an adaptive order without bins of validation segments: nothing to measure progress by; score the "
            "validation shards into the same folder and make the order again"
        )
    bins = len(manifest["bin_tokens"])
    val = np.bincount(np.arange(len(val)), weights=val, minlength=bins)
    if not val.all():
        raise InputError(
            f"{path}: bin {int(np.argmin(val))} of {bins} has no token among the {int(val.sum())} validation tokens: "
            "its progress cannot be measured; use fewer bins or more data.val_tokens"
        )
    if (decisions := len(validated) - 2) < FEWEST_DECISIONS:
        raise InputError(
            f"{path}: adaptive, but with {len(validated)} validations in {validated[-1]} steps weights change "
            f"{max(decisions, 0)} times (each time from one validation to the next, not after the last): expected at "
            f"least {FEWEST_DECISIONS}; lower data.val_every"
        )
    bin_N = np.asarray(load_hashed(bins_path(path), manifest["entry_bins_sha256"]))
    return Pool(whole, bin_N, Rule(**manifest["adaptive"]), manifest["seed"], plan, validated)


# ----------------------------------------------------------------------------------------------------------------------
# Replay


def main(run: Path, /, out: Path, order: Path | None = None) -> None:
    """Write what an adaptive run has drawn as a static order: trained on with the same settings, the same losses.

    Args:
        run: the run's folder; the run must have come to its end.
        out: the order file to write (.npy).
        order: the run's order file, if it has moved.
    """
    from curriculum.config import validate
    from curriculum.order import load_hashed, load_order, load_val_bins, save_order, val_path
    from curriculum.records import read_run

    if out.suffix != ".npy":
        raise InputError(f"--out {out}: an order file ends in .npy")
    if out.exists():
        raise InputError(f"{out}: already there; remove it or choose another --out")
    told = read_run(run)
    decisions = [row for row in told.rows if "drawn_sha256" in row]
    if not decisions:
        raise InputError(f"{run}: not an adaptive run: its order is as static as a replay would be")
    if told.final_val_nats is None:
        raise InputError(
            f"{run}: not finished ({told.rows[-1]['step']} of {told.about['steps']} steps): continue it first"
        )
    cfg = validate(told.about["config"], str(run))
    path = order or Path(cfg.data.order)
    drawn_from = load_order(path)
    if drawn_from.manifest["order_sha256"] != told.order_key:
        raise InputError(f"{path}: not the order that {run} drew from; name it by --order")
    ids = np.concatenate([load_hashed(drawn_path(run, row["step"]), row["drawn_sha256"]) for row in decisions])
    manifest = dict(drawn_from.manifest)
    for key in ("version", "order_sha256", "multiset_sha256", "recipe", "adaptive", "entry_bins_sha256"):
        del manifest[key]
    manifest |= diagnosed(path, drawn_from, ids, cfg, told, decisions)
    bin_V = load_val_bins(path, manifest)
    with atomic_path(val_path(out)) as temporary, open(temporary, "wb") as file:
        np.save(file, bin_V)
    save_order(out, ids, manifest)
    track = "every token of the pool" if manifest["multiset"] == "exact" else "a selection from the pool"
    print(
        f"{out}: {len(ids):,} segments, {manifest['num_tokens']:,} tokens, {track}; drawn in {len(decisions)} stretches"
    )
    print(f"  train on it with --run.steps {cfg.run.steps} and the other settings of {run}")


def diagnosed(path: Path, drawn_from, ids: np.ndarray, cfg, told, decisions: list[dict]) -> dict:
    """Of a replay's manifest, what is not as in the order it was drawn from. Ranks are those of the bins' middles."""
    from curriculum.bins import Bins
    from curriculum.diagnostics import describe
    from curriculum.order import GRID, Built, bins_path, load_hashed
    from data.segments import corpus_segments
    from data.shards import open_corpus

    about = drawn_from.manifest
    pool = np.asarray(drawn_from.ids_N)
    segments = corpus_segments(open_corpus(cfg.data.shards, quiet=True), about["max_len"], about["unit"])
    bin_of = np.empty(len(segments), np.int16)
    bin_of[pool] = load_hashed(bins_path(path), about["entry_bins_sha256"])
    mass_S = np.array(about["bin_tokens"]) / sum(about["bin_tokens"])
    rank_S = np.cumsum(mass_S) - mass_S / 2
    id_N = np.unique(pool)
    id_N = id_N[np.argsort(bin_of[id_N], kind="stable")]
    cut = np.searchsorted(bin_of[id_N], np.arange(len(mass_S) + 1))
    place_of = np.empty(len(segments), np.int64)
    place_of[id_N] = np.arange(len(id_N))
    rank_N = rank_S[bin_of[id_N]].astype(np.float32)
    bins = Bins(np.arange(len(id_N)), segments.length_N[id_N], rank_N, cut, np.array([]), np.array([]))
    length_M, num_tokens = segments.length_N[ids], int(segments.length_N[ids].sum(dtype=np.int64))
    begins = np.array([row["tokens"] for row in decisions]) / num_tokens
    stretch_G = np.searchsorted(begins, (np.arange(GRID) + 0.5) / GRID, side="right") - 1
    asked_GS = np.array([row["bin_weights"] for row in decisions])[stretch_G] * (num_tokens / GRID)
    built = Built(place_of[ids], length_M, bin_of[ids], rank_N[place_of[ids]], bins, asked_GS, 0.0)
    whole = len(ids) == len(pool)  # streams are never drawn twice
    return dict(
        multiset="exact" if whole else "reweight",
        num_segments=len(ids),
        schedule_error=0.0,
        replay_of=dict(run=told.name, seed=told.about["seed"], steps=told.about["steps"], digest=told.digest),
        drawn_from_sha256=about["order_sha256"],
        diagnosed_with=dict(config=str(told.folder), batch_tokens=cfg.data.batch_tokens),
        **describe(built, cfg.data.batch_tokens, cfg.optim.lr_scale),
    )


if __name__ == "__main__":
    command(main)
