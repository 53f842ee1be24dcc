"""Train a GPT on an order of data. One file, top to bottom: attention, model, optimizers, evaluation, training. It
reads an order of segments; it knows nothing of entropy.

    python train_gpt.py configs/demo.toml --data.order orders/random-0.npy
    torchrun --nproc_per_node=8 train_gpt.py configs/speed.toml --run.seed 1
    python train_gpt.py --ablate configs/small_speed.toml --run.num_seeds 3       # the preset without each technique

The techniques are those of the nanoGPT speedrun (github.com/KellerJordan/modded-nanogpt) that need no kernels of one's
own. Each is a few lines at one place, with the record it came from (#n) and what it brought there. All are settings:
configs/ holds the presets, curriculum/config.py says what each does.

A run folder holds config.json, metrics.jsonl (the only source of truth: one JSON object a line), last.pt (resume
point), step<k>.pt (kept) and drawn/ (what was drawn from an adaptive order, whose bins are weighed anew after every
validation). The same command continues an unfinished run, exactly, with any number of processes.

Shapes: T tokens of one flat row   D model_dim   H heads   E head_dim   V vocabulary   L longest document
        M matrices of R rows and C columns   K tokens ahead
"""

import sys

from curriculum.config import GATE_DIM, Config, Model, Optim, parse_args, stage

if __name__ == "__main__":  # before torch is imported: --help and a typo answer at once
    from data.cli import guarded

    CONFIG = guarded(lambda: parse_args([a for a in sys.argv[1:] if a != "--ablate"]))

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from curriculum import runs
from curriculum.adaptive import Course
from curriculum.fused import HeadLoss, compiled, linear, norm, relu_squared
from curriculum.loader import Batch, Counters, Packed, Plan, Stream, most_documents, planned, prefetched
from curriculum.runs import Work, prepare
from curriculum.runs import load_checkpoint as load_checkpoint  # curriculum.reference asks here
from curriculum.world import Bundle, PairwiseSum, World
from data.cli import InputError
from data.segments import packed_rows

# ----------------------------------------------------------------------------------------------------------------------
# Attention within documents (#12: 1573M -> 983M tokens, the largest single gain)


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
    scatter_T = torch.from_numpy(scatter_T)
    return Documents(torch.from_numpy(bounds), max_len, torch.from_numpy(position_T), gather, scatter_T)


def attend(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, docs: Documents, scale: float, window: int = 0) -> Tensor:
    """Causal attention within each document; (T, H, E). A token sees itself and `window` tokens before it (0: all).

    Keys and values may have fewer heads (grouped queries).
    """
    if k_THE.shape[1] != q_THE.shape[1]:
        repeats = q_THE.shape[1] // k_THE.shape[1]
        k_THE, v_THE = k_THE.repeat_interleave(repeats, 1), v_THE.repeat_interleave(repeats, 1)
    if q_THE.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        # window_size (w, 0) is causal, -1 means no limit: the signature of torch >= 2.11, where is_causal went away.
        return varlen_attn(
            *(q_THE, k_THE, v_THE, docs.bounds, docs.bounds, docs.max_len, docs.max_len),
            scale=scale,
            window_size=(window or -1, 0),
        )
    if len(docs.gather) == 1 and docs.gather[0].numel() == len(q_THE):  # equal lengths: a view will do
        blocks = [x.view(*docs.gather[0].shape, *x.shape[1:]).transpose(1, 2) for x in (q_THE, k_THE, v_THE)]
        return windowed(*blocks, scale, window).transpose(1, 2).reshape(q_THE.shape)
    outs = []
    for index in docs.gather:
        shape = (*index.shape, -1, q_THE.shape[2])  # (documents, L, H, E)
        blocks = [x.index_select(0, index.view(-1)).view(shape).transpose(1, 2) for x in (q_THE, k_THE, v_THE)]
        outs.append(windowed(*blocks, scale, window).transpose(1, 2).reshape(-1, *q_THE.shape[1:]))
    return torch.cat(outs).index_select(0, docs.scatter_T)


def windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Causal attention of whole sequences, (documents, H, L, E), on a CPU."""
    length = q.shape[2]
    if not window or length <= window + 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    size = 1 << (length - 1).bit_length()  # a mask's corner is the mask of a shorter document: few sizes are kept
    return F.scaled_dot_product_attention(q, k, v, attn_mask=band(size, window)[:length, :length], scale=scale)


@cache
def band(size: int, window: int) -> Tensor:
    """True where column j may be seen from row i: i - window <= j <= i."""
    return torch.ones(size, size, dtype=torch.bool).tril().triu(-window)


def before(x_T: Tensor, docs: Documents) -> Tensor:
    """What stands one token earlier in the same document; a document's first token has its own. Any (T, ...)."""
    first_T = (docs.position_T == 0).view(-1, *[1] * (x_T.ndim - 1))
    return torch.where(first_T, x_T, torch.cat([x_T[:1], x_T[:-1]]))


def rotary(position_T: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (T, 1, 1, E). Half of the pairs do not turn: they carry what needs no position."""
    frequency = base ** -torch.linspace(0, 1, head_dim // 4, device=position_T.device)
    angle = position_T[:, None].float() * torch.cat([frequency, torch.zeros_like(frequency)])
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], 1)[:, None, None], torch.cat([sin, -sin], 1)[:, None, None]


def rotate(x_T2HE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries and keys at once; a pair is a number of the first half of a head and one of the second."""
    return (x_T2HE * cos + x_T2HE.roll(x_T2HE.shape[-1] // 2, -1) * sin).type_as(x_T2HE)


# ----------------------------------------------------------------------------------------------------------------------
# Model


def parameter(*shape: int, wanted: bool = True) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape)) if wanted else None


class Block(nn.Module):
    def __init__(self, cfg: Model, layer: int, has_value_embed: bool):
        super().__init__()
        dim, self.cfg = cfg.model_dim, cfg
        # Long and short windows (#13 and #20: 5.03 -> 4.66 -> 2.99 min, with other things).
        is_long = layer == cfg.num_layers - 1 or cfg.window_pattern[layer % len(cfg.window_pattern)] == "L"
        self.window = cfg.window if is_long else cfg.short_window or cfg.window
        self.offsets_keys = cfg.key_offset and is_long
        self.qkv = parameter(3, dim, dim)  # one product (#20), three matrices to Muon
        self.attn_proj = parameter(dim, dim)
        self.mlp_up = parameter(cfg.mlp_ratio * dim, dim)
        self.mlp_proj = parameter(dim, cfg.mlp_ratio * dim)
        self.x0_mix = parameter(2, wanted=cfg.x0_mix)  # of the stream and of the embedding it began as
        self.value_mix = parameter(2, wanted=has_value_embed)
        self.attn_gate = parameter(dim // cfg.head_dim, GATE_DIM, wanted=cfg.attention_gate)
        self.qkv_bias, self.mlp_up_bias = (parameter(n * dim, wanted=cfg.biases) for n in (3, cfg.mlp_ratio))
        self.attn_proj_bias, self.mlp_proj_bias = (parameter(dim, wanted=cfg.biases) for _ in range(2))
        self.attn_gain, self.mlp_gain = (parameter(dim, wanted=cfg.gains) for _ in range(2))

    def forward(self, x_TD, x0_TD, value_embed_TD, cos, sin, docs: Documents, window_share: float) -> Tensor:
        if self.x0_mix is not None:  # x0 mixing (#9, with value residuals and softcap: 4578 -> 3200 steps)
            x_TD = self.x0_mix[0].type_as(x_TD) * x_TD + self.x0_mix[1].type_as(x_TD) * x0_TD
        y_TD = norm(x_TD, self.attn_gain)
        qkv = linear(y_TD, self.qkv.flatten(0, 1), self.qkv_bias).view(len(x_TD), 3, -1, self.cfg.head_dim)
        qk, v = qkv.split((2, 1), dim=1)
        (q, k), v = rotate(norm(qk), cos, sin).unbind(1), v.squeeze(1)
        if value_embed_TD is not None:  # value embeddings (#14: 1750 -> 1530 steps)
            mix = self.value_mix.type_as(v)
            v = mix[0] * v + mix[1] * value_embed_TD.view_as(v)
        if self.offsets_keys:  # partial key offset (#49: -2.3 % steps): one layer can find what followed a token
            turns_1, stays_1, turns_2, stays_2 = k.chunk(4, dim=-1)
            stays_1, stays_2 = before(torch.stack([stays_1, stays_2], 1), docs).unbind(1)
            k = torch.cat([turns_1, stays_1, turns_2, stays_2], dim=-1)
        y_THE = attend(q, k, v, docs, self.cfg.attention_scale, math.ceil(self.window * window_share))
        if self.attn_gate is not None:  # a head can keep silent (#28: -55 steps, at a dearer step)
            y_THE = y_THE * (2 * torch.sigmoid(linear(y_TD[:, :GATE_DIM], self.attn_gate)))[..., None]
        x_TD = x_TD + linear(y_THE.flatten(1), self.attn_proj, self.attn_proj_bias)
        y_TF = relu_squared(linear(norm(x_TD, self.mlp_gain), self.mlp_up, self.mlp_up_bias))
        return x_TD + linear(y_TF, self.mlp_proj, self.mlp_proj_bias)


# What the learned numbers begin as: techniques begin out of the way, or as far in as their records have them.
FIRST = {"x0_mix": (1, 0), "value_mix": (0.5, 0.5), "skip_mix": (0.18,), "backout_mix": (0.5,), "smear_mix": (0,)}


class GPT(nn.Module):
    """RoPE, QK-norm, ReLU^2, RMSNorm, untied softcapped head, zero-init projections (#5: 22.3 -> 15.2 min; #8; #18).

    The vocabulary is padded to a multiple of 128 (GEMMs like it); the padding columns are never read.
    """

    def __init__(self, cfg: Model, vocab_size: int):
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        padded = -(-vocab_size // 128) * 128
        self.embed = parameter(padded, cfg.model_dim)
        self.value_embeds = nn.ParameterList(parameter(padded, cfg.model_dim) for _ in range(cfg.num_value_embeds))
        # Table i feeds layer i and layer num_layers - n + i (#15: 3 tables, U-shaped).
        last = cfg.num_layers - cfg.num_value_embeds
        self.value_embed_of_layer = [
            i if i < cfg.num_value_embeds else i - last if i >= last else None for i in range(cfg.num_layers)
        ]
        self.blocks = nn.ModuleList(
            Block(cfg, i, table is not None) for i, table in enumerate(self.value_embed_of_layer)
        )
        self.head = parameter(padded, cfg.model_dim)
        self.head_bias = parameter(vocab_size, wanted=cfg.biases)
        self.embed_gain, self.final_gain = (parameter(cfg.model_dim, wanted=cfg.gains) for _ in range(2))
        self.skip_mix, self.backout_mix = parameter(1, wanted=cfg.skip), parameter(1, wanted=cfg.backout)
        self.smear_mix, self.smear_gate = parameter(1, wanted=cfg.smear), parameter(1, GATE_DIM, wanted=cfg.smear)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Matrices N(0, 0.33 / fan_in), embeddings N(0, 1), projections and head zero: the first loss is ln V."""
        generator = torch.Generator().manual_seed(seed)  # of the CPU: the same weights on every device
        for name, values in self.named_parameters():
            kind = name.rpartition(".")[2]
            if kind in FIRST:
                values.copy_(torch.tensor(FIRST[kind]))
            elif kind.endswith("gain"):
                values.fill_(1.0)
            elif kind.endswith(("proj", "bias", "gate")) or (kind == "head" and not self.cfg.tie_frac):
                values.zero_()
            else:
                fan_in = values.shape[-1]
                std = 0.005 if kind == "head" else 1.0 if "embed" in name else (0.33 / fan_in) ** 0.5
                values.copy_(torch.randn(values.shape, generator=generator).mul_(std))
        if self.cfg.tie_frac:
            self.embed.copy_(self.head)

    def hidden(self, token_T: Tensor, docs: Documents, window_share: float = 1.0) -> Tensor:
        """Final normalised hidden states (T, D), in bf16 on CUDA and fp32 on CPU."""
        dtype = torch.bfloat16 if token_T.is_cuda else torch.float32
        x_TD = F.embedding(token_T, self.embed).to(dtype)
        if self.smear_mix is not None:  # smear (#34: -5 to -15 steps); nothing from the document before
            share_T1 = self.smear_mix.type_as(x_TD) * torch.sigmoid(linear(x_TD[:, :GATE_DIM], self.smear_gate))
            x_TD = x_TD + share_T1 * (docs.position_T > 0)[:, None] * before(x_TD, docs)
        x_TD = x0_TD = norm(x_TD, self.embed_gain)
        values = [F.embedding(token_T, table).to(dtype) for table in self.value_embeds]
        cos, sin = rotary(docs.position_T, self.cfg.head_dim, self.cfg.rope_base)
        layers, kept = self.cfg.num_layers, {}
        for i, (block, table) in enumerate(zip(self.blocks, self.value_embed_of_layer, strict=True)):
            if self.skip_mix is not None and i == (layers + 1) // 2:  # skip connection (#11, #45: one is enough)
                x_TD = x_TD + self.skip_mix.type_as(x_TD) * kept[(layers - 1) // 4]
            x_TD = block(x_TD, x0_TD, None if table is None else values[table], cos, sin, docs, window_share)
            kept[i] = x_TD
        if self.backout_mix is not None:  # backout (#40: -3.6 % steps): what served later layers is taken off again
            x_TD = x_TD - self.backout_mix.type_as(x_TD) * kept[2 * layers // 3]
        return norm(x_TD, self.final_gain)

    def forward(self, token_T: Tensor, target_T: Tensor, docs: Documents, window_share=1.0, ahead=()) -> Tensor:
        """Cross-entropy of every prediction (T,), fp32 nats. Its gradient is that of the sum: weight it by a scalar.

        With weights `ahead` the gradient has the losses of the second, third, ... token ahead in it as well: prediction
        of many tokens (#53: -4 to -5.6 % steps). A target of -1 counts for nothing.
        """
        hidden_TD = self.hidden(token_T, docs, window_share)
        head_VD = self.head.type_as(hidden_TD)[: self.vocab_size]
        target_KT = target_T[None].expand(1 + len(ahead), -1).clone()
        for k in range(1, len(target_KT)):  # the next token's k-th target, where it lies in the same document
            target_KT[k, -k:] = -1
            follows_T = docs.position_T[k:] == docs.position_T[:-k] + k
            target_KT[k, :-k] = torch.where(follows_T, target_T[k:], -1)
        weight_K = torch.tensor([1.0, *ahead], device=token_T.device)
        return HeadLoss.apply(hidden_TD, head_VD, self.head_bias, target_KT, weight_K, self.cfg.softcap)

    def flops_per_token(self, length_N: np.ndarray) -> float:
        """Multiplications and additions of a training step, for documents of these lengths.

        6 for each weight of a matrix product (2 forward, 4 backward), and 12 D for each key that a query sees in each
        layer (q.k and weights.v). Causality and windows count: what is masked is not work done.
        """
        products = sum(p.numel() for name, p in self.blocks.named_parameters() if p.ndim >= 2 and "gate" not in name)
        length_N, keys = length_N.astype(np.float64), 0.0
        for block in self.blocks:
            reach_N = np.minimum(length_N, block.window + 1) if block.window else length_N
            keys += (reach_N * (reach_N + 1) / 2 + (length_N - reach_N) * reach_N).sum() / length_N.sum()
        return 6 * (products + self.vocab_size * self.cfg.model_dim) + 12 * self.cfg.model_dim * keys


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers: Muon for the hidden matrices (#3: 31.4 -> 24.9 min), AdamW for everything else, both shared out (#6)

# Polynomials a x + b x^3 + c x^5, one for each iteration, the last one repeated; and what a matrix is divided by before
# it, over its Frobenius norm. Jordan et al. (2024) drive singular values to 0.7 .. 1.2 in 5 iterations; the simple one
# converges to 1 in 12 (track 3 of the speedrun); Polar Express (Amsel et al. 2025, #38: -0.4 s) is optimal at every
# iteration, for singular values from 0.001 on, with a margin for bf16.
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
POLYNOMIALS = {
    "jordan": (1.0, [(3.4445, -4.7750, 2.0315)]),
    "simple": (1.0, [(2.0, -1.5, 0.5)]),
    "polar_express": (1.02, POLAR_EXPRESS),
}


def orthogonalise(G_MRC: Tensor, iterations: int, polynomials: str = "jordan") -> Tensor:
    """Newton-Schulz towards the nearest semi-orthogonal matrix, for a batch of matrices: all singular values near 1."""
    margin, coefficients = POLYNOMIALS[polynomials]
    X = G_MRC.bfloat16() if G_MRC.is_cuda else G_MRC
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * margin + 1e-7)
    for i in range(iterations):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).type_as(G_MRC)


def evened(update_MRC: Tensor, second: Tensor, beta: float) -> Tensor:
    """NorMuon (Li et al. 2025; #41, #42: -50 steps, -2.7 s): rows (columns, if there are more of them) of an update are
    divided by their running RMS; its norm stays what it was."""
    square = update_MRC.square().mean(dim=-1 if second.shape[-1] == 1 else -2, keepdim=True)
    second.mul_(beta).add_(square * (1 - beta))
    scaled = update_MRC * second.clamp_min(1e-10).rsqrt()
    norms = [x.norm(dim=(-2, -1), keepdim=True) for x in (update_MRC, scaled)]
    return scaled * (norms[0] / norms[1].clamp_min(1e-10))


def muon_update(weight_MRC, gradient_MRC, momentum_MRC, second, lr, momentum, *settings) -> None:
    """One step in place, of matrices of one shape. Compiled on CUDA: lr and momentum are tensors there, so that a new
    value compiles nothing. `second` is None without NorMuon."""
    iterations, polynomials, beta, decay, cautious = settings
    momentum_MRC.mul_(momentum).add_(gradient_MRC * (1 - momentum))
    update_MRC = orthogonalise(gradient_MRC * (1 - momentum) + momentum_MRC * momentum, iterations, polynomials)
    if second is not None:
        update_MRC = evened(update_MRC, second, beta)
    shrink = lr * decay
    if cautious:  # cautious weight decay (#43: -1.8 % steps): not against the update
        shrink = shrink * (update_MRC * weight_MRC >= 0)
    # Wider outputs move further: keeps the RMS change of a layer's output alike across shapes.
    scale = max(1, weight_MRC.shape[-2] / weight_MRC.shape[-1]) ** 0.5
    weight_MRC.mul_(1 - shrink).sub_(update_MRC * (lr * scale))


class Muon:
    """Momentum, orthogonalised (Jordan et al. 2024), or NorMuon. Matrices of one shape are stepped together; a
    parameter's leading dimensions count matrices."""

    def __init__(self, parameters: list[nn.Parameter], cfg: Optim, world: World):
        self.cfg, self.device = cfg, world.device
        by_shape: dict[tuple, list[nn.Parameter]] = {}
        for p in parameters:
            by_shape.setdefault(tuple(p.shape[-2:]), []).append(p)
        self.bundles = [Bundle(members, shape, world) for shape, members in by_shape.items()]
        self.state = [{"momentum": torch.zeros_like(bundle.own)} for bundle in self.bundles]
        if cfg.normuon_beta:
            for bundle, state in zip(self.bundles, self.state, strict=True):
                tall = bundle.own.shape[-2] >= bundle.own.shape[-1]
                state["second"] = torch.zeros_like(bundle.own[..., :1] if tall else bundle.own[..., :1, :])

    def step(self, gradients: list[Tensor], scale: float, momentum: float) -> None:
        """One step of the owned shares; `scale` is the learning rate over its peak."""
        cfg, lr = self.cfg, self.cfg.muon_lr * scale
        update = muon_update
        if self.device.type == "cuda":
            update, lr, momentum = compiled(muon_update), torch.tensor(lr), torch.tensor(momentum)
        settings = (cfg.muon_iterations, cfg.muon_coefficients, cfg.normuon_beta, cfg.muon_weight_decay, cfg.cautious)
        for bundle, state, gradient in zip(self.bundles, self.state, gradients, strict=True):
            update(bundle.own, gradient, state["momentum"], state.get("second"), lr, momentum, *settings)


class Adam:
    """AdamW (fused), of numbers in a row: one bundle for each learning rate."""

    def __init__(self, groups: list[tuple[float, list[nn.Parameter]]], cfg: Optim, world: World):
        self.cfg, self.lrs = cfg, [lr for lr, _ in groups]
        self.bundles = [Bundle(parameters, (), world) for _, parameters in groups]
        self.shares = [nn.Parameter(bundle.own) for bundle in self.bundles]  # the same memory
        self.adam = torch.optim.AdamW(
            [dict(params=[share]) for share in self.shares],
            betas=cfg.adam_betas,
            eps=cfg.adam_eps,
            weight_decay=0.0 if cfg.cautious else cfg.adam_weight_decay,
            fused=True,
        )
        for share in self.shares:
            keys = ("exp_avg", "exp_avg_sq", "waiting")[: 3 if cfg.adam_every > 1 else 2]
            zeros = {key: torch.zeros_like(share.data) for key in keys}
            self.adam.state[share] = zeros | {"step": torch.zeros((), device=share.device)}
        self.state = [self.adam.state[share] for share in self.shares]

    def step(self, gradients: list[Tensor], scale: float, step: int) -> None:
        """Every adam_every-th step (#39: every second one, -1.2 % time) AdamW steps on the sum of the gradients."""
        if self.cfg.adam_every > 1:
            gradients = [state["waiting"].add_(g) for state, g in zip(self.state, gradients, strict=True)]
            if (step + 1) % self.cfg.adam_every:
                return
        for group, share, gradient, lr in zip(self.adam.param_groups, self.shares, gradients, self.lrs, strict=True):
            group["lr"], share.grad = lr * scale, gradient
        self.adam.step()
        for share, state, lr in zip(self.shares, self.state, self.lrs, strict=True):
            if self.cfg.cautious:  # on AdamW as well (#50: -1 % steps); the sign of its step is that of exp_avg
                shrink = lr * scale * self.cfg.adam_weight_decay
                share.data.mul_(1 - shrink * (state["exp_avg"] * share.data >= 0))
            if self.cfg.adam_every > 1:
                state["waiting"].zero_()


class Optimizers:
    """Every parameter in exactly one group; learning rates set from progress; state saved by parameter name."""

    def __init__(self, model: GPT, cfg: Optim, world: World):
        self.cfg, self.model, self.world = cfg, model, world
        self.names = {p: name for name, p in model.named_parameters()}
        kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in ("matrix", "embed", "head", "scalar")}
        for p, name in self.names.items():
            if name == "head" or name == "embed" and model.cfg.tie_frac:  # once tied, they stay alike
                kinds["head"].append(p)
            elif name == "embed" or name.startswith("value_embeds."):
                kinds["embed"].append(p)
            else:
                kinds["matrix" if p.ndim >= 2 and "gate" not in name else "scalar"].append(p)
        self.muon = Muon(kinds["matrix"], cfg, world)
        lrs = dict(embed=cfg.embed_lr, head=cfg.head_lr, scalar=cfg.scalar_lr)
        self.adam = Adam([(lrs[kind], kinds[kind]) for kind in lrs if kinds[kind]], cfg, world)
        self.bundles = self.muon.bundles + self.adam.bundles
        self.states = self.muon.state + self.adam.state
        held = [p for bundle in self.bundles for p in bundle.parameters]
        assert len(held) == len(set(held)) == len(self.names), "every parameter is in exactly one group"
        self.averages = [torch.empty_like(bundle.values) for bundle in self.bundles] if cfg.average_frac else []
        self.num_averaged = 0

    def reset(self) -> None:
        """Forget everything: as if made anew, for another seed."""
        for state in self.states:
            for values in state.values():
                values.zero_()
        self.num_averaged = 0

    def step(self, gradients: list[Tensor], step: int, progress: float, batch_share: float = 1.0) -> None:
        """One update at `progress` in [0, 1): reduce, step, gather. `gradients` are this process's, by parameter."""
        scale = self.cfg.lr_scale(progress) * batch_share**0.5
        gradient_of = dict(zip(self.names, gradients, strict=True))
        arriving = [bundle.reduce(gradient_of) for bundle in self.bundles]
        num_muon = len(self.muon.bundles)
        self.muon.step([wait() for wait in arriving[:num_muon]], scale, self.cfg.momentum(progress))
        gathering = [bundle.gather() for bundle in self.muon.bundles]
        self.adam.step([wait() for wait in arriving[num_muon:]], scale, step)
        for wait in gathering + [bundle.gather() for bundle in self.adam.bundles]:
            wait()
        if self.averages and progress >= 1 - self.cfg.average_frac:
            self.num_averaged += 1
            weight = max(1 / self.num_averaged, 1 - self.cfg.average_decay if self.cfg.average_decay else 0)
            for average, bundle in zip(self.averages, self.bundles, strict=True):
                average.copy_(bundle.values) if weight == 1 else average.lerp_(bundle.values, weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model holds the average of its weights, if there is one by now."""
        chosen = list(zip(self.averages, self.bundles, strict=True)) if self.num_averaged else []
        trained = [bundle.values.clone() for _, bundle in chosen]
        for average, bundle in chosen:
            bundle.values.copy_(average)
        yield
        for (_, bundle), values in zip(chosen, trained, strict=True):
            bundle.values.copy_(values)

    def untie(self) -> None:
        """Embedding and head part (#51, #53: -2.7 % steps): they are equal so far, and so becomes what Adam knows."""
        state = self.state_dict()
        state["embed"] = state["head"]
        self.load_state_dict(state)

    def state_dict(self) -> dict:
        """Of every parameter by name, whole, on the CPU. All processes take part."""
        found: dict[str, dict] = {name: {} for name in self.names.values()}
        for bundle, state in zip(self.bundles, self.states, strict=True):
            for key, values in state.items():
                parts = bundle.whole(values) if values.ndim else [values] * len(bundle.parameters)
                for p, part in zip(bundle.parameters, parts, strict=True):
                    found[self.names[p]][key] = part.to("cpu", copy=True)
        return found

    def load_state_dict(self, state_of_name: dict) -> None:
        for bundle, state in zip(self.bundles, self.states, strict=True):
            for key, values in state.items():
                parts = [state_of_name[self.names[p]][key] for p in bundle.parameters]
                values.copy_(bundle.share(bundle.laid_out(parts)) if values.ndim else parts[0])

    def weights(self) -> dict:
        """What a checkpoint holds of the model: `model`, to be used, and if that is an average, what is `trained`."""

        def held():
            return {name: p.detach().to("cpu", copy=True) for p, name in self.names.items()}

        if not self.num_averaged:
            return dict(model=held())
        with self.averaged():
            average = held()
        return dict(model=average, trained=held(), num_averaged=self.num_averaged)

    def load_weights(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        if "trained" in saved:
            self.num_averaged = saved["num_averaged"]
            for average, bundle in zip(self.averages, self.bundles, strict=True):
                average.copy_(bundle.values)
            self.model.load_state_dict(saved["trained"])


# ----------------------------------------------------------------------------------------------------------------------
# Batches on the device, and evaluation


class Fixed(NamedTuple):
    """CUDA: what every row is filled up to, so that nothing is compiled twice."""

    row_tokens: int
    max_documents: int


def to_device(part: Packed, max_len: int, device, fixed: Fixed | None = None) -> tuple[Tensor, Tensor, Documents]:
    """Inputs, targets and documents (none longer than `max_len`) of a row; on CUDA it is filled up with documents whose
    targets are -1."""
    token_T, target_T = (torch.from_numpy(x.astype(np.int64)) for x in (part.input_T, part.target_T))
    bounds = part.bounds
    if fixed is not None:
        filler = max(0, fixed.row_tokens - len(token_T))
        ends = np.arange(len(token_T), len(token_T) + filler, max_len)[1:]
        bounds = np.concatenate([bounds, ends, [len(token_T) + filler]])
        bounds = np.concatenate([bounds, np.full(max(0, fixed.max_documents + 1 - len(bounds)), bounds[-1])])
        token_T, target_T = F.pad(token_T, (0, filler)), F.pad(target_T, (0, filler), value=-1)
        token_T, target_T = (x.pin_memory().to(device, non_blocking=True) for x in (token_T, target_T))
    return token_T, target_T, documents(bounds, max_len, device)


@torch.no_grad()
def evaluate(model, stream: Stream, val_tokens: int, cfg: Config, world: World, bin_N=None, fixed=None) -> dict:
    """Mean cross-entropy (nats) over the first `val_tokens` of `stream`, and over each bin of segments.

    Rows hold whole segments, as in scoring. Bins without a token are null.
    """
    length_N = stream.segments.length_N[stream.ids]
    bounds, end_N = packed_rows(length_N, cfg.data.micro_batch_tokens), stream.end
    num_bins = int(bin_N.max()) + 1 if bin_N is not None else 1
    sums = torch.zeros(2, num_bins, dtype=torch.float64)
    for row in range(world.rank, len(bounds) - 1, world.size):
        first, last = bounds[row], bounds[row + 1]
        begin, end = end_N[first] - length_N[first], min(end_N[last - 1], val_tokens)
        if begin >= end:
            break
        part = stream.read(begin, end)
        nll_T = model(*to_device(part, cfg.data.seq_len, world.device, fixed))[: end - begin].double().cpu()
        documents_T = np.repeat(np.arange(first, first + len(part.bounds) - 1), np.diff(part.bounds))
        bin_T = torch.from_numpy((bin_N[documents_T] if bin_N is not None else 0 * documents_T).astype(np.int64))
        sums[0].index_add_(0, bin_T, nll_T)
        sums[1].index_add_(0, bin_T, torch.ones_like(nll_T))
    sums = world.sum(sums)
    record = {"val_nats": (sums[0].sum() / sums[1].sum()).item()}
    if bin_N is not None:
        record["bin_nats"] = [s / n if n else None for s, n in zip(*sums.tolist(), strict=True)]
    return record


def validate(trainer: "Trainer", work: Work, last: bool) -> dict:
    """Validation, with averaged weights if there are any; at the end under both public protocols: rows of 1,024 tokens
    without a mask, as in track 3 of the speedrun, and documents with a mask, as in its main track."""
    cfg, world = trainer.cfg, trainer.world
    mine, other = ("rows", "documents") if work.unit == "window" else ("documents", "rows")
    with trainer.optimizers.averaged():
        record = evaluate(trainer.model, work.val, work.val_tokens, cfg, world, work.bin_N, trainer.fixed)
        if last:
            found = evaluate(trainer.model, work.other_val, work.val_tokens, cfg, world, fixed=trainer.fixed)
            record |= {f"{mine}_nats": record["val_nats"], f"{other}_nats": found["val_nats"]}
    return record


# ----------------------------------------------------------------------------------------------------------------------
# Training


PHASES = ("forward", "backward", "optimizer")


class Trainer(NamedTuple):
    """What several seeds share: made, and on CUDA compiled, once."""

    cfg: Config
    model: GPT
    optimizers: Optimizers
    world: World
    fixed: Fixed | None
    spent_s: dict[str, float]  # with run.split_times: seconds of every phase of all steps


def train(cfg: Config, world: World) -> bool:
    """Run all seeds of `cfg`; False if time was up before the end."""
    say = print if world.leads else (lambda *_, **__: None)
    runs.check_mirrors(cfg)
    started, trainer = time.perf_counter(), None
    for one in cfg.seeds():
        work = prepare(one, say)
        runs.check_shares(work, world.size)
        folder = runs.claim_folder(one, work, world.leads)
        with runs.out_of_memory_advised(cfg):
            trainer = trainer or make_trainer(cfg, work, world)
            if not train_seed(one, work, folder, trainer, started):
                return False
    return True


def make_trainer(cfg: Config, work: Work, world: World) -> Trainer:
    model = GPT(cfg.model, work.corpus.vocab_size).to(world.device)
    optimizers = Optimizers(model, cfg.optim, world)
    if world.device.type == "cpu":
        return Trainer(cfg, model, optimizers, world, None, dict.fromkeys(PHASES, 0.0))
    row_tokens, whole = cfg.data.micro_batch_tokens, work.plan
    steps = dict(steps=work.steps, max_len=whole.max_len_S)
    most = most_documents(work.train, np.diff(whole.begin_S), whole.parts_S, **steps)
    if work.pool:
        most = max(most, work.pool.most_documents())
    for stream in (work.val, work.other_val):
        most = max(most, int(np.diff(packed_rows(stream.segments.length_N, row_tokens)).max()))
    filler = -(-row_tokens // int(whole.max_len_S.min()))
    fixed = Fixed(row_tokens, -(-(most + filler) // 64) * 64)
    trainer = Trainer(cfg, model, optimizers, world, fixed, dict.fromkeys(PHASES, 0.0))
    model.hidden = torch.compile(model.hidden, dynamic=False)
    # Compile before the clock runs: one step at every window size, and an evaluation. Weights come afterwards.
    model.init_weights(0)
    part = work.train.read(0, min(row_tokens, work.train.num_tokens))
    for share in dict.fromkeys(cfg.model.window_schedule or (1.0,)):
        model(*to_device(part, cfg.data.seq_len, world.device, fixed), share, cfg.model.mtp_weights).sum().backward()
        optimizers.step([p.grad for p in model.parameters()], cfg.optim.adam_every - 1, 0.0)
        model.zero_grad(set_to_none=True)
    with torch.no_grad():
        model(*to_device(part, cfg.data.seq_len, world.device, fixed))
    torch.cuda.reset_peak_memory_stats()
    return trainer


def train_step(cfg: Config, work: Work, trainer: Trainer, batch: Batch) -> Tensor:
    """Forward, backward, update. Returns this process's part of the mean loss (nats)."""
    model, optimizers, world = trainer.model, trainer.optimizers, trainer.world
    at = [int(work.plan.begin_S[step]) / work.tokens for step in (max(0, batch.step - 1), batch.step)]
    progress, tied = at[1], at[1] < cfg.model.tie_frac
    if at[0] < cfg.model.tie_frac <= at[1]:
        optimizers.untie()
    ahead = [w * (1 - 1.5 * progress) for w in cfg.model.mtp_weights if progress < 2 / 3]
    # Waiting for the device after every phase costs time: only where asked for.
    clock = world.clock if cfg.run.split_times else time.perf_counter
    laps = [clock()]
    loss, gradients = torch.zeros((), device=world.device), PairwiseSum()
    for part in batch.parts:
        part_loss = model(*part, stage(cfg.model.window_schedule, progress), ahead).sum() / batch.num_tokens
        laps.append(clock())
        part_loss.backward()
        if tied:
            model.head.grad += model.embed.grad
            model.embed.grad.zero_()
        gradients.take([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
        loss += part_loss.detach()
        laps.append(clock())
    # In a short last batch a process may be without a micro-batch: it takes part with zeros.
    summed = gradients.total() or [torch.zeros_like(p) for p in model.parameters()]
    # Batch-size schedule (#46: -65 steps): the learning rate goes with the square root of the batch.
    optimizers.step(summed, batch.step, progress, stage(cfg.data.batch_schedule, progress))
    if tied:
        model.embed.data.copy_(model.head.data)
    laps.append(clock())
    for i, (begin, end) in enumerate(pairwise(laps)):
        trainer.spent_s[PHASES[2 if i == len(laps) - 2 else i % 2]] += end - begin
    return loss


def begin_from(path: str, trainer: Trainer) -> None:
    """Take weights and optimizer state of a checkpoint; InputError if they are of another model or other optimizers."""
    saved = runs.load_checkpoint(Path(path))
    try:
        trainer.model.load_state_dict(saved.get("trained", saved["model"]))  # not their average, if it holds one
        trainer.optimizers.load_state_dict(saved["optimizer"])
    except (KeyError, RuntimeError) as error:
        what = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"run.init_from {path}: of another model or optimizer than this run's ({what})") from None


def train_seed(cfg: Config, work: Work, folder: Path, trainer: Trainer, started: float) -> bool:
    """One run, from its beginning or its resume point to its end. False if time was up before."""
    model, optimizers, world = trainer.model, trainer.optimizers, trainer.world
    say = print if world.leads else (lambda *_, **__: None)
    model.init_weights(cfg.run.seed)
    optimizers.reset()
    step, time_s, log_size, target, history = 0, 0.0, 0, None, None
    if saved := runs.newest_resume_point(folder, world.leads, say):
        optimizers.load_weights(saved)
        optimizers.load_state_dict(saved["optimizer"])
        step, time_s, log_size, target = saved["step"], saved["time_s"], saved["log_size"], saved.get("target")
        history = saved.get("history")
        say(f"{folder}: continuing at step {step} of {work.steps}")
    elif cfg.run.init_from:
        begin_from(cfg.run.init_from, trainer)
    mirrors = runs.open_mirrors(cfg, work, folder) if world.leads else []
    log = runs.Log(folder / "metrics.jsonl", log_size, world.leads, mirrors)
    flops, peak = model.flops_per_token(work.train.segments.length_N), runs.peak_flops(world.device)
    if step == 0:
        numbers = dict(parameters=sum(p.numel() for p in model.parameters()), flops_per_token=flops, peak_flops=peak)
        log.write(runs.about_run(cfg, work, world.device, world.size, **numbers))
        if cfg.run.init_from:  # what the branch begins at
            log.write(dict(step=0, tokens=0, **validate(trainer, work, last=False), time_s=0.0))
    course = Course(work.pool, folder if world.leads else None, history) if work.pool else None
    if course and not history:
        log.write(dict(step=0, tokens=0, time_s=0.0, **course.decide(0, None)))
    tokens = int(work.plan.begin_S[step])
    keep = {max(1, round(fraction * work.steps)) for fraction in cfg.run.save_at}
    last_save, clock, measured_from = time.perf_counter(), world.clock(), step
    rate_from = (tokens, time_s)  # tokens/s are measured from one logged row to the next

    def save(*paths: Path) -> None:
        """All processes take part in collecting the optimizers' state; the first writes."""
        state = dict(
            step=step,
            time_s=time_s,
            log_size=log.size,
            target=target,
            history=course and course.history,
            optimizer=optimizers.state_dict(),
            vocab_size=work.corpus.vocab_size,
            config=cfg.model_dump(mode="json"),
            identity=work.identity,
            **optimizers.weights(),
        )
        if not all(torch.isfinite(values).all() for values in state["model"].values()):
            raise InputError(runs.diverged("weights are not finite", step, folder))
        if world.leads:
            for path in paths:
                runs.save_checkpoint(path, state)
            runs.save_resume_point(folder, state, cfg.run.keep_checkpoints)

    def batches(first_step: int) -> Iterator[Batch]:
        """All that are left. With a course, a stretch of them is laid out once the losses before it are known."""
        stream, stretches = work.train, [range(first_step, work.steps)]
        if course:
            stream, stretches = course.stream, course.stretches(first_step)
        for stretch in stretches:
            source = planned(stream, work.plan, stretch, world.rank, world.size)
            yield from prefetched(placed(source, work.plan, trainer), counters=counters)

    counters, validated = Counters(), set(runs.validations(cfg.data, work.steps))
    for batch in batches(step):
        loss = train_step(cfg, work, trainer, batch)
        step, tokens = step + 1, tokens + batch.num_tokens
        last, kept = step == work.steps, step in keep

        logged = step % cfg.run.log_every == 0
        if logged or last or kept:
            train_nats = world.sum(loss).item()
            time_s, clock = time_s + world.clock() - clock, world.clock()
            if not math.isfinite(train_nats) or step > work.steps / 10 and train_nats > math.log(model.vocab_size) + 1:
                raise InputError(runs.diverged(f"the loss is {train_nats:.4g}", step, folder))
        if logged or last:
            per_second = (tokens - rate_from[0]) / max(time_s - rate_from[1], 1e-9)
            rate_from = (tokens, time_s)
            mfu = flops * per_second / (peak * world.size) if peak else None
            row = dict(step=step, tokens=tokens, train_nats=train_nats, time_s=round(time_s, 3))
            row |= dict(wait_s=round(counters.wait_seconds, 4), tokens_per_second=round(per_second), mfu=mfu)
            if cfg.run.split_times:
                row |= {f"{phase}_s": round(seconds, 4) for phase, seconds in trainer.spent_s.items()}
            log.write(row | dict(memory_gib=runs.memory_gib(world.device)))
            log.say(
                f"step:{step}/{work.steps} train_loss:{train_nats:.4f} train_time:{1000 * time_s:.0f}ms "
                f"tok/s:{per_second:.0f} {f'mfu:{100 * mfu:.1f}% ' if mfu else ''}"
                f"eta:{(work.tokens - tokens) / per_second:.0f}s"
            )
        if step in validated:  # the clock stands still here
            time_s += world.clock() - clock
            record = validate(trainer, work, last)
            if cfg.run.target_nats and target is None and record["val_nats"] <= cfg.run.target_nats:
                target = dict(target_tokens=tokens, target_s=round(time_s, 3))
                log.say(f"{folder}: reached {cfg.run.target_nats} nats after {tokens:,} tokens, {time_s:.1f} s")
            log.write(dict(step=step, tokens=tokens, **record, time_s=round(time_s, 3), **(target or {})))
            if course and not last:
                decided = course.decide(step, record["bin_nats"])
                log.write(dict(step=step, tokens=tokens, time_s=round(time_s, 3), **decided))
            log.say(
                f"step:{step}/{work.steps} val_loss:{record['val_nats']:.5f} train_time:{1000 * time_s:.0f}ms "
                f"step_avg:{1000 * time_s / step:.2f}ms"
            )
            clock = world.clock()
        out_of_time = bool(cfg.run.max_seconds) and time.perf_counter() - started > cfg.run.max_seconds
        due = time.perf_counter() - last_save > cfg.run.checkpoint_seconds
        # Asked at logged steps only: agreeing waits for the device, as logging has just done.
        if kept or last or (logged and world.agrees(due or out_of_time)):
            time_s += world.clock() - clock
            save(*[folder / f"step{step}.pt"] if kept else [])
            last_save = time.perf_counter()
            if logged and not last and world.agrees(out_of_time):
                log.say(f"{folder}: stopped after {cfg.run.max_seconds:g} s at step {step} of {work.steps}")
                return False
            clock = world.clock()
    log.say(f"{folder}: finished {work.steps} steps, {(step - measured_from)} of them now")
    return True


def placed(batches: Iterator[Batch], plan: Plan, trainer: Trainer) -> Iterator[Batch]:
    """The batches, on the device. Runs ahead, in a thread (whose device would be GPU 0)."""
    if trainer.fixed is not None:
        torch.cuda.set_device(trainer.world.device)
    for batch in batches:
        max_len = int(plan.max_len_S[batch.step])
        parts = [to_device(part, max_len, trainer.world.device, trainer.fixed) for part in batch.parts]
        yield batch._replace(parts=parts)


def main() -> None:
    world = World()
    try:
        if "--ablate" in sys.argv:
            from curriculum.ablate import ablate

            ablate(CONFIG, lambda cfg: train(cfg, world), world.leads)
        else:
            train(CONFIG, world)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    runs.keep_freed_memory()
    guarded(main)
