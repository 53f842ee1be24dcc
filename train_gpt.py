"""Train a GPT on an order of data. One file, top to bottom: attention, model, optimizers, evaluation, checkpoint,
log, main. It reads an order of segments; it knows nothing of entropy.

    python train_gpt.py configs/demo.toml --data.order orders/random-0.npy
    torchrun --nproc_per_node=8 train_gpt.py configs/anchor.toml --run.seed 1

A run folder holds config.json, metrics.jsonl (the only source of truth: one JSON object a line), last.pt (resume
point) and step<k>.pt (kept checkpoints). The same command continues an unfinished run, exactly, at any world size.

Shapes: T tokens of one flat row   D model_dim   H heads   E head_dim   V vocabulary   L longest document   M matrices
"""

from curriculum.config import Config, Model, Optim, parse_args

if __name__ == "__main__":  # before torch is imported: --help and a typo answer at once
    from data.cli import guarded

    CONFIG = guarded(parse_args)

import ctypes
import hashlib
import json
import os
import platform
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from curriculum.loader import Packed, Stream, batches, prefetched
from curriculum.moments import softcapped
from data.cli import InputError
from data.files import atomic_path, read_json, write_json
from data.segments import corpus_segments, packed_rows
from data.shards import Corpus, open_corpus

# ----------------------------------------------------------------------------------------------------------------------
# Attention within documents


class Documents(NamedTuple):
    """Where the documents of a flat row of T tokens lie, ready for `attend`."""

    bounds: Tensor  # int32 (num_documents + 1,), on the device
    max_len: int  # no document is longer
    position_T: Tensor  # of each token in its document
    gather: list[Tensor]  # CPU only: (documents, L) row indices of documents of about equal length, padded
    scatter_T: Tensor | None  # CPU only: where each token lies in the concatenation of the gathered blocks


BUCKET = 32  # CPU: documents are padded to a multiple of this, so that alike ones share one attention call


def documents(bounds: np.ndarray, max_len: int, device: torch.device) -> Documents:
    """Lay out documents given by their `bounds` (num_documents + 1,) within a row."""
    start, length = bounds[:-1].astype(np.int64), np.diff(bounds).astype(np.int64)
    position_T = np.arange(bounds[-1]) - np.repeat(start, length)
    if device.type == "cuda":
        on_device = torch.from_numpy(bounds.astype(np.int32)).to(device, non_blocking=True)
        return Documents(on_device, max_len, torch.from_numpy(position_T).to(device, non_blocking=True), [], None)
    # No CPU kernel knows document bounds, and a dense [T, T] mask costs about 5x: batch documents of similar length,
    # padded at the end, where causality keeps the padding out of sight.
    gather, scatter_T, offset = [], np.empty(bounds[-1], np.int64), 0
    padded = -(-length // BUCKET) * BUCKET
    for size in np.unique(padded):
        chosen = np.flatnonzero(padded == size)
        longest = length[chosen].max()
        column = np.arange(longest)
        index = start[chosen, None] + np.minimum(column, length[chosen, None] - 1)
        real = column < length[chosen, None]
        scatter_T[index[real]] = offset + np.flatnonzero(real.ravel())
        gather.append(torch.from_numpy(index))
        offset += index.size
    return Documents(
        torch.from_numpy(bounds), max_len, torch.from_numpy(position_T), gather, torch.from_numpy(scatter_T)
    )


def attend(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, docs: Documents, scale: float) -> Tensor:
    """Causal attention within each document; (T, H, E). Keys and values may have fewer heads (grouped queries)."""
    if k_THE.shape[1] != q_THE.shape[1]:
        repeats = q_THE.shape[1] // k_THE.shape[1]
        k_THE, v_THE = k_THE.repeat_interleave(repeats, 1), v_THE.repeat_interleave(repeats, 1)
    if q_THE.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        # window_size (-1, 0) is causal: the signature of torch >= 2.11, where is_causal went away.
        return varlen_attn(
            q_THE, k_THE, v_THE, docs.bounds, docs.bounds, docs.max_len, docs.max_len, scale=scale, window_size=(-1, 0)
        )
    if len(docs.gather) == 1 and docs.gather[0].numel() == len(q_THE):  # equal lengths: a view will do
        blocks = [x.view(*docs.gather[0].shape, *x.shape[1:]).transpose(1, 2) for x in (q_THE, k_THE, v_THE)]
        out = F.scaled_dot_product_attention(*blocks, is_causal=True, scale=scale)
        return out.transpose(1, 2).reshape(q_THE.shape)
    outs = []
    for index in docs.gather:
        shape = (*index.shape, -1, q_THE.shape[2])  # (documents, L, H, E)
        blocks = [x.index_select(0, index.view(-1)).view(shape).transpose(1, 2) for x in (q_THE, k_THE, v_THE)]
        out = F.scaled_dot_product_attention(*blocks, is_causal=True, scale=scale)
        outs.append(out.transpose(1, 2).reshape(-1, *q_THE.shape[1:]))
    return torch.cat(outs).index_select(0, docs.scatter_T)


def rotary(position_T: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, E/2). Half of the pairs do not turn at all: they carry what needs no position."""
    frequency = base ** -torch.linspace(0, 1, head_dim // 4, device=position_T.device)
    frequency = torch.cat([frequency, torch.zeros_like(frequency)])
    angle = position_T[:, None].float() * frequency
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_THE.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x_THE)


# ----------------------------------------------------------------------------------------------------------------------
# Model


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Weights are kept in fp32 and used in the type of the activations: fp32 on CPU, bf16 on CUDA."""
    return F.linear(x, weight.type_as(x))


class Block(nn.Module):
    def __init__(self, cfg: Model, has_value_embed: bool):
        super().__init__()
        dim, self.head_dim, self.scale = cfg.model_dim, cfg.head_dim, cfg.attention_scale
        self.qkv = nn.Parameter(torch.empty(3, dim, dim))
        self.attn_proj = nn.Parameter(torch.empty(dim, dim))
        self.mlp_up = nn.Parameter(torch.empty(cfg.mlp_ratio * dim, dim))
        self.mlp_proj = nn.Parameter(torch.empty(dim, cfg.mlp_ratio * dim))
        self.x0_mix = nn.Parameter(torch.tensor([1.0, 0.0]))  # of the stream and of the embedding it began as
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if has_value_embed else None

    def forward(self, x_TD, x0_TD, value_embed_TD, cos, sin, docs: Documents) -> Tensor:
        x_TD = self.x0_mix[0].type_as(x_TD) * x_TD + self.x0_mix[1].type_as(x_TD) * x0_TD
        q, k, v = linear(norm(x_TD), self.qkv.flatten(0, 1)).view(len(x_TD), 3, -1, self.head_dim).unbind(1)
        if value_embed_TD is not None:
            mix = self.value_mix.type_as(v)
            v = mix[0] * v + mix[1] * value_embed_TD.view_as(v)
        y_THE = attend(rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v, docs, self.scale)
        x_TD = x_TD + linear(y_THE.flatten(1), self.attn_proj)
        return x_TD + linear(F.relu(linear(norm(x_TD), self.mlp_up)).square(), self.mlp_proj)


class GPT(nn.Module):
    """RoPE, QK-norm, ReLU^2, RMSNorm without gains, untied softcapped head, value embeddings, zero-init projections.

    The vocabulary is padded to a multiple of 128 (GEMMs like it); the padding columns are never read.
    """

    def __init__(self, cfg: Model, vocab_size: int):
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        padded = -(-vocab_size // 128) * 128
        self.embed = nn.Parameter(torch.empty(padded, cfg.model_dim))
        self.value_embeds = nn.ParameterList(torch.empty(padded, cfg.model_dim) for _ in range(cfg.num_value_embeds))
        # Table i feeds layer i and layer num_layers - n + i, as in the speedrun's record 15 (3 tables, U-shaped).
        last = cfg.num_layers - cfg.num_value_embeds
        self.value_embed_of_layer = [
            i if i < cfg.num_value_embeds else i - last if i >= last else None for i in range(cfg.num_layers)
        ]
        self.blocks = nn.ModuleList(Block(cfg, i is not None) for i in self.value_embed_of_layer)
        self.head = nn.Parameter(torch.empty(padded, cfg.model_dim))

    def init_weights(self, seed: int) -> None:
        """Matrices N(0, 0.33 / fan_in), embeddings N(0, 1), projections and head zero: the first loss is ln V."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("proj") or name == "head":
                nn.init.zeros_(parameter)
            elif "embed" in name:
                nn.init.normal_(parameter, generator=generator)
            elif parameter.ndim >= 2:
                nn.init.normal_(parameter, std=(0.33 / parameter.shape[-1]) ** 0.5, generator=generator)

    def hidden(self, token_T: Tensor, docs: Documents) -> Tensor:
        """Final normalised hidden states (T, D), in bf16 on CUDA and fp32 on CPU."""
        dtype = torch.bfloat16 if token_T.is_cuda else torch.float32
        x_TD = x0_TD = norm(F.embedding(token_T, self.embed).to(dtype))
        values = [F.embedding(token_T, table).to(dtype) for table in self.value_embeds]
        cos, sin = rotary(docs.position_T, self.cfg.head_dim, self.cfg.rope_base)
        for block, table in zip(self.blocks, self.value_embed_of_layer, strict=True):
            x_TD = block(x_TD, x0_TD, None if table is None else values[table], cos, sin, docs)
        return norm(x_TD)

    def forward(self, token_T: Tensor, target_T: Tensor, docs: Documents) -> Tensor:
        """Cross-entropy of every prediction (T,), fp32 nats. Its gradient is that of the sum: weight it by a scalar."""
        hidden_TD = self.hidden(token_T, docs)
        head_VD = self.head.type_as(hidden_TD)[: self.vocab_size]
        return HeadLoss.apply(hidden_TD, head_VD, target_T, self.cfg.softcap)


class HeadLoss(torch.autograd.Function):
    """Head, softcap and cross-entropy, a block of rows at a time, with the gradient made on the way.

    The [T, V] logits are the largest thing in a small model. In blocks they stay in a CPU's cache and are never held
    whole; the gradient costs no second pass over them. Measured on the demo model: see LOG.md, 2026-11-21.
    """

    @staticmethod
    def forward(ctx, hidden_TD, head_VD, target_T, cap):
        wants_grad = any(ctx.needs_input_grad)
        block_rows = 256 if hidden_TD.device.type == "cpu" else 8192
        nll_T = hidden_TD.new_empty(len(hidden_TD), dtype=torch.float32)
        grad_hidden_TD = torch.empty_like(hidden_TD) if wants_grad else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_grad else None
        block_loss = compiled_block_loss() if hidden_TD.is_cuda else block_loss_eager
        for at in range(0, len(hidden_TD), block_rows):
            rows = slice(at, at + block_rows)
            nll_T[rows], grad_NV = block_loss(hidden_TD[rows] @ head_VD.T, target_T[rows], cap, wants_grad)
            if wants_grad:
                grad_hidden_TD[rows] = grad_NV @ head_VD
                grad_head_VD += grad_NV.T @ hidden_TD[rows]
        ctx.save_for_backward(grad_hidden_TD, grad_head_VD)
        return nll_T

    @staticmethod
    def backward(ctx, grad_T):
        grad_hidden_TD, grad_head_VD = ctx.saved_tensors
        weight = grad_T[0]  # every token weighs the same: the trainer's loss is a sum over tokens times a scalar
        return grad_hidden_TD * weight.type_as(grad_hidden_TD), grad_head_VD * weight, None, None


def block_loss_eager(logits_NV: Tensor, target_N: Tensor, cap: float, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of N rows (fp32), and its gradient with respect to the uncapped logits in their type.

    With z = x (1 + x^2/c^2)^-1/2 the slope is dz/dx = (1 - z^2/c^2)^3/2, so nothing but z is needed for it.
    """
    z_NV = softcapped(logits_NV.float(), cap)
    lse_N = z_NV.logsumexp(1)
    nll_N = lse_N - z_NV.gather(1, target_N[:, None])[:, 0]
    if not wants_grad:
        return nll_N, None
    grad_NV = (z_NV - lse_N[:, None]).exp_()
    grad_NV.scatter_add_(1, target_N[:, None], grad_NV.new_full((len(target_N), 1), -1.0))
    if cap:
        slope_NV = 1 - (z_NV / cap) ** 2
        grad_NV *= slope_NV * slope_NV.sqrt()
    return nll_N, grad_NV.type_as(logits_NV)


@cache
def compiled_block_loss():
    return torch.compile(block_loss_eager, dynamic=False)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers: Muon for the hidden matrices, AdamW for everything else


def orthogonalise(G_MRC: Tensor, iterations: int) -> Tensor:
    """Newton-Schulz towards the nearest semi-orthogonal matrix, for a batch of matrices (Jordan et al. 2024, Muon).

    The quintic x -> a x + b x^3 + c x^5 drives every singular value to about 1 (0.7 to 1.2 with these coefficients).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G_MRC.bfloat16() if G_MRC.is_cuda else G_MRC
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).type_as(G_MRC)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. A parameter's leading dimensions count matrices; equal shapes are stepped together."""

    def __init__(self, parameters, lr: float, momentum: float, weight_decay: float, iterations: int):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=iterations)
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict[tuple, list[Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(tuple(parameter.shape[-2:]), []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    nesterov = parameter.grad.lerp(state["momentum"], group["momentum"])
                    updates.append(nesterov.view(-1, rows, columns))
                stacked = orthogonalise(torch.cat(updates), group["iterations"])
                scale = max(1, rows / columns) ** 0.5  # keeps the RMS change of the output alike across shapes
                for parameter, update in zip(parameters, stacked.split([len(u) for u in updates]), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


class Optimizers:
    """Every parameter in exactly one group; learning rates set from progress; state saved by parameter name."""

    def __init__(self, model: GPT, cfg: Optim):
        self.cfg, self.names = cfg, {p: name for name, p in model.named_parameters()}
        matrices, embeds, heads, scalars = [], [], [], []
        for name, parameter in model.named_parameters():
            if name.startswith("blocks."):
                (matrices if parameter.ndim >= 2 else scalars).append(parameter)
            else:
                (heads if name == "head" else embeds).append(parameter)
        muon = Muon(matrices, cfg.muon_lr, cfg.muon_momentum, cfg.muon_weight_decay, cfg.muon_iterations)
        adam = torch.optim.AdamW(
            [
                dict(params=embeds, lr=cfg.embed_lr),
                dict(params=heads, lr=cfg.head_lr),
                dict(params=scalars, lr=cfg.scalar_lr),
            ],
            betas=cfg.adam_betas,
            eps=cfg.adam_eps,
            weight_decay=cfg.adam_weight_decay,
            fused=True,
        )
        self.all = [muon, adam]
        self.peak_lr = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all]
        held = [p for optimizer in self.all for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held)) == len(self.names), "every parameter is in exactly one group"

    def step(self, progress: float) -> None:
        """One update at `progress` in [0, 1); gradients are dropped afterwards."""
        scale = self.cfg.lr_scale(progress)
        for optimizer, peaks in zip(self.all, self.peak_lr, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {self.names[p]: state for optimizer in self.all for p, state in optimizer.state.items()}

    def load_state_dict(self, state_of_name: dict) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = state_of_name[self.names[parameter]]
                    # AdamW's step counter must stay a float32 tensor on the parameter's device for the fused kernel.
                    optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def to_device(part: Packed, max_len: int, device: torch.device) -> tuple[Tensor, Tensor, Documents]:
    token_T, target_T = (torch.from_numpy(x.astype(np.int64)) for x in (part.input_T, part.target_T))
    if device.type == "cuda":
        token_T, target_T = (x.pin_memory().to(device, non_blocking=True) for x in (token_T, target_T))
    return token_T, target_T, documents(part.bounds, max_len, device)


@torch.no_grad()
def evaluate(model, stream: Stream, val_tokens: int, cfg: Config, world: "World", bin_N=None) -> dict:
    """Mean cross-entropy (nats) over the first `val_tokens` of `stream`, and over each bin of segments.

    Rows hold whole segments, as in scoring. Bins without a token are null.
    """
    length_N = stream.segments.length_N[stream.ids]
    bounds = packed_rows(length_N, cfg.data.micro_batch_tokens)
    end_N = stream.end
    num_bins = int(bin_N.max()) + 1 if bin_N is not None else 1
    sums = torch.zeros(2, num_bins, dtype=torch.float64)
    for row in range(world.rank, len(bounds) - 1, world.size):
        first, last = bounds[row], bounds[row + 1]
        begin, end = end_N[first] - length_N[first], min(end_N[last - 1], val_tokens)
        if begin >= end:
            break
        part = stream.read(begin, end)
        nll_T = model(*to_device(part, cfg.data.seq_len, world.device)).double().cpu()
        documents_T = np.repeat(np.arange(first, first + len(part.bounds) - 1), np.diff(part.bounds))
        bin_T = torch.from_numpy((bin_N[documents_T] if bin_N is not None else 0 * documents_T).astype(np.int64))
        sums[0].index_add_(0, bin_T, nll_T)
        sums[1].index_add_(0, bin_T, torch.ones_like(nll_T))
    sums = world.sum(sums)
    record = {"val_nats": (sums[0].sum() / sums[1].sum()).item()}
    if bin_N is not None:
        record["bin_nats"] = [s / n if n else None for s, n in zip(*sums.tolist(), strict=True)]
    return record


# ----------------------------------------------------------------------------------------------------------------------
# Processes


class World:
    """This process among those `torchrun` started (or alone)."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum over processes; x may lie on any device."""
        if self.size == 1:
            return x
        x = x.to(self.device)
        dist.all_reduce(x)
        return x.cpu()

    def sum_gradients(self, sums: "PairwiseSum", model: nn.Module) -> None:
        """Set every parameter's gradient to the sum over all micro-batches of all processes."""
        # In a short last batch a process may be without a micro-batch: it takes part with zeros.
        gradients = sums.total() or [torch.zeros_like(p) for p in model.parameters()]
        if self.size > 1:
            for wait in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                wait.wait()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient

    def agrees(self, flag: bool) -> bool:
        """The first process's opinion: clocks differ, and all must stop at the same step."""
        if self.size == 1:
            return flag
        told = torch.tensor([flag], dtype=torch.int32, device=self.device)
        dist.broadcast(told, 0)
        return bool(told.item())

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class PairwiseSum:
    """Gradients of micro-batches, added as a balanced binary tree: ((0 + 1) + (2 + 3)) + ...

    A process holds a subtree, so the sum does not depend on how many processes share the work: two agree with one to
    the bit. Added one after another they would not, and Muon and Adam amplify the last bit (3e-5 nats after 4 steps of
    the tests' model). Holds up to log2(micro-batches) + 1 sets of gradients.
    """

    def __init__(self):
        self.partial: list[tuple[int, list[Tensor]]] = []  # sizes fall from left to right, as in a binary number

    def take(self, model: nn.Module) -> None:
        """Add the gradients of the micro-batch just done, and clear them."""
        size, gradients = 1, [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        while self.partial and self.partial[-1][0] == size:
            gradients = self.merged(gradients)
            size *= 2
        self.partial.append((size, gradients))

    def merged(self, later: list[Tensor]) -> list[Tensor]:
        _, earlier = self.partial.pop()
        torch._foreach_add_(earlier, later)
        return earlier

    def total(self) -> list[Tensor]:
        gradients = self.partial.pop()[1] if self.partial else []
        while self.partial:
            gradients = self.merged(gradients)
        return gradients


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and the log


def save_checkpoint(path: Path, state: dict) -> None:
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path) -> dict:
    """Tensors and plain values only: no code of the file is run. Raises InputError if it is not whole."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises whatever its unpickler meets
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from None


class Log:
    """metrics.jsonl, appended and flushed row by row by the first process; `size` is part of a checkpoint."""

    def __init__(self, path: Path, size: int, leads: bool):
        self.leads, self.size = leads, size
        if leads:
            path.touch()
            os.truncate(path, size)  # rows after the resume point will be written again, the same
            self.file = open(path, "a", encoding="utf-8")

    def write(self, record: dict) -> None:
        if self.leads:
            line = json.dumps(record, allow_nan=False) + "\n"
            self.file.write(line)
            self.file.flush()
            self.size += len(line.encode())

    def say(self, message: str) -> None:
        if self.leads:
            print(message, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# What a run works on, checked before it starts


class Work(NamedTuple):
    train: Stream
    val: Stream
    val_tokens: int
    bin_N: np.ndarray | None  # of the validation segments
    corpus: Corpus
    steps: int
    identity: dict  # all that must be equal for a run folder to be continued
    order: dict  # what the log says of the order


def prepare(cfg: Config, say) -> Work:
    """Open shards and order; raise InputError, in one sentence, on anything that does not fit together."""
    data = cfg.data
    corpus = open_corpus(data.shards, quiet=True)
    val_corpus = open_corpus(data.val_shards or corpus.folder, "val", quiet=True)
    if (val_corpus.vocab_size, val_corpus.tokenizer) != (corpus.vocab_size, corpus.tokenizer):
        raise InputError(f"{val_corpus.folder}: the validation shards have another tokenizer than {corpus.folder}")
    unit, order, recipe, bin_N = data.unit, None, "stock", None
    if data.order:
        from curriculum.order import check_segments, load_order, load_val_bins

        order = load_order(data.order)
        unit, recipe = order.manifest["unit"], order.manifest["recipe"]
        if order.manifest["max_len"] != data.seq_len:
            raise InputError(
                f"{data.order}: made for segments of at most {order.manifest['max_len']} tokens, "
                f"data.seq_len is {data.seq_len}"
            )
    segments = corpus_segments(corpus, data.seq_len, unit)
    val_segments = corpus_segments(val_corpus, data.seq_len, unit)
    if order is not None:
        check_segments(order, segments, data.order)
        if "val_segments_sha256" in order.manifest:
            if order.manifest["val_segments_sha256"] != val_segments.digest():
                raise InputError(f"{data.order}: its validation bins were made for other validation shards")
            bin_N = load_val_bins(data.order, order.manifest)
    ids = np.arange(len(segments)) if order is None else np.asarray(order.ids_N)
    train = Stream(corpus, segments, ids)
    val = Stream(val_corpus, val_segments, np.arange(len(val_segments)))
    steps = cfg.run.steps or -(-train.num_tokens // data.batch_tokens)
    if (steps - 1) * data.batch_tokens >= train.num_tokens:
        raise InputError(
            f"run.steps {steps} of {data.batch_tokens} tokens need {steps * data.batch_tokens} tokens, "
            f"the order holds {train.num_tokens} ({-(-train.num_tokens // data.batch_tokens)} steps)"
        )
    used = min(steps * data.batch_tokens, train.num_tokens)
    if used < train.num_tokens:
        say(f"note: the run stops after {used:,} of the order's {train.num_tokens:,} tokens; other orders see others")
    if data.val_tokens > val.num_tokens:
        say(f"note: only {val.num_tokens:,} validation tokens there, {data.val_tokens:,} asked for: using all")
    order_sha256 = order.manifest["order_sha256"] if order else "stock"
    identity = dict(
        digest=cfg.digest(recipe),
        name=cfg.run.name,
        seed=cfg.run.seed,
        order_sha256=order_sha256,
        segments_sha256=segments.digest(),
        val_segments_sha256=val_segments.digest(),
    )
    multiset_sha256 = hashlib.sha256(np.sort(ids.astype(np.int64)).data).hexdigest()
    about = dict(recipe=recipe, order_sha256=order_sha256, multiset_sha256=multiset_sha256, tokens=train.num_tokens)
    if order is not None:
        keys = ("measure", "schedule", "bins", "seed", "num_segments")
        about |= {key: order.manifest[key] for key in keys}
    return Work(train, val, min(data.val_tokens, val.num_tokens), bin_N, corpus, steps, identity, about)


def claim_folder(cfg: Config, work: Work, leads: bool) -> Path:
    """The run folder, new or this very run's; another run's is refused."""
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
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: not empty and not a run folder; choose another run.out_dir")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, dict(identity=work.identity, config=cfg.model_dump(mode="json")))
    return folder


def hardware(device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return dict(device=name, threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version())


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(cfg: Config, world: World) -> None:
    say = print if world.leads else (lambda *_, **__: None)
    work = prepare(cfg, say)
    num_parts = cfg.data.batch_tokens // cfg.data.micro_batch_tokens
    if num_parts % world.size:
        raise InputError(
            f"{num_parts} micro-batches (data.batch_tokens / data.micro_batch_tokens) cannot be shared "
            f"by {world.size} processes"
        )
    folder = claim_folder(cfg, work, world.leads)
    model = GPT(cfg.model, work.corpus.vocab_size)
    model.init_weights(cfg.run.seed)
    model.to(world.device)
    optimizers = Optimizers(model, cfg.optim)
    step, time_s, log_size = 0, 0.0, 0
    if (folder / "last.pt").exists():
        saved = load_checkpoint(folder / "last.pt")
        model.load_state_dict(saved["model"])
        optimizers.load_state_dict(saved["optimizer"])
        step, time_s, log_size = saved["step"], saved["time_s"], saved["log_size"]
        say(f"{folder}: continuing at step {step} of {work.steps}")
    log = Log(folder / "metrics.jsonl", log_size, world.leads)
    if step == 0:
        log.write(
            dict(
                kind="run",
                name=cfg.run.name,
                seed=cfg.run.seed,
                steps=work.steps,
                config=cfg.model_dump(mode="json"),
                identity=work.identity,
                order=work.order,
                val_tokens=work.val_tokens,
                parameters=sum(p.numel() for p in model.parameters()),
                code_sha256=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
                hardware=hardware(world.device),
                processes=world.size,
            )
        )
    compiled = torch.compile(model, dynamic=False) if world.device.type == "cuda" else model
    keep = {max(1, round(fraction * work.steps)) for fraction in cfg.run.save_at}
    started = last_save = time.perf_counter()
    clock, measured_from = world.clock(), step

    def save(path: Path) -> None:
        state = dict(
            step=step,
            time_s=time_s,
            log_size=log.size,
            model=model.state_dict(),
            optimizer=optimizers.state_dict(),
            vocab_size=work.corpus.vocab_size,
            config=cfg.model_dump(mode="json"),
            identity=work.identity,
        )
        if world.leads:
            save_checkpoint(path, state)

    source = batches(
        work.train,
        cfg.data.batch_tokens,
        num_parts,
        first_step=step,
        steps=work.steps,
        rank=world.rank,
        world=world.size,
    )
    wait_s, ready = 0.0, prefetched(source)
    while True:
        asked = time.perf_counter()
        batch = next(ready, None)
        if batch is None:
            break
        wait_s += time.perf_counter() - asked
        loss, gradients = torch.zeros((), device=world.device), PairwiseSum()
        for part in batch.parts:
            part_loss = compiled(*to_device(part, cfg.data.seq_len, world.device)).sum() / batch.num_tokens
            part_loss.backward()
            gradients.take(model)
            loss += part_loss.detach()
        world.sum_gradients(gradients, model)
        optimizers.step(batch.step / work.steps)
        step = batch.step + 1
        tokens = min(step * cfg.data.batch_tokens, work.train.num_tokens)
        last = step == work.steps

        if step % cfg.run.log_every == 0 or last:
            train_nats = world.sum(loss).item()
            time_s, clock = time_s + world.clock() - clock, world.clock()
            if not np.isfinite(train_nats):
                raise InputError(
                    f"the loss is {train_nats} at step {step}: the run diverged; lower the learning rates "
                    f"(the last good checkpoint is in {folder})"
                )
            log.write(
                dict(step=step, tokens=tokens, train_nats=train_nats, time_s=round(time_s, 3), wait_s=round(wait_s, 4))
            )
            log.say(f"step:{step}/{work.steps} train_loss:{train_nats:.4f} train_time:{1000 * time_s:.0f}ms")
        if step % cfg.data.val_every == 0 or last:  # the clock stands still here
            time_s += world.clock() - clock
            record = evaluate(compiled, work.val, work.val_tokens, cfg, world, work.bin_N)
            log.write(dict(step=step, tokens=tokens, **record, time_s=round(time_s, 3)))
            log.say(
                f"step:{step}/{work.steps} val_loss:{record['val_nats']:.5f} train_time:{1000 * time_s:.0f}ms "
                f"step_avg:{1000 * time_s / max(step, 1):.2f}ms"
            )
            clock = world.clock()
        out_of_time = bool(cfg.run.max_seconds) and time.perf_counter() - started > cfg.run.max_seconds
        due = time.perf_counter() - last_save > cfg.run.checkpoint_seconds
        # Asked at logged steps only: agreeing waits for the device, as logging has just done.
        logged = step % cfg.run.log_every == 0
        if step in keep or last or (logged and world.agrees(due or out_of_time)):
            time_s += world.clock() - clock
            if step in keep:
                save(folder / f"step{step}.pt")
            save(folder / "last.pt")
            last_save = time.perf_counter()
            if logged and not last and world.agrees(out_of_time):
                log.say(f"{folder}: stopped after {cfg.run.max_seconds:g} s at step {step} of {work.steps}")
                return
            clock = world.clock()
    log.say(f"{folder}: finished {work.steps} steps, {(step - measured_from)} of them now")


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks: giving them back and faulting them in again at every use costs a CPU run a
    third of its speed (LOG.md, 2026-11-21: 6.1k -> 9.0k tokens/s)."""
    if sys.platform == "linux":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def main() -> None:
    world = World()
    try:
        train(CONFIG, world)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    keep_freed_memory()
    guarded(main)
