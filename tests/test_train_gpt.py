"""The trainer: its parts against plain formulas, and runs that are killed, stopped, shared out and refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
from curriculum import ablate, fused
from curriculum.config import Config, Optim, validate
from curriculum.loader import Packed, planned
from curriculum.moments import softcapped
from data.cli import InputError

CPU = torch.device("cpu")
ONE = train_gpt.World()
ONE.device = CPU  # what is promised to the bit is promised there
ALONE = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).parents[1]
TINY = dict(
    run=dict(name="tiny", checkpoint_seconds=1e-9, log_every=1),
    data=dict(seq_len=64, batch_tokens=256, micro_batch_tokens=64, val_tokens=1000, val_every=7),
    model=dict(num_layers=2, model_dim=32, head_dim=16, num_value_embeds=1),
)


# What each preset does beyond `demo`, and every flag: resuming and sharing out must be exact with all of it.
FEATURES = dict(
    demo={},
    anchor=dict(
        data=dict(unit="window"),
        model=dict(biases=True, gains=True, x0_mix=False, num_value_embeds=0),
        optim=dict(muon_coefficients="simple", muon_iterations=12),
    ),
    speed=dict(
        model=dict(num_layers=4, window=40, short_window=12, window_schedule=(0.5, 1.0), skip=True, backout=True)
        | dict(key_offset=True),
        optim=dict(muon_coefficients="polar_express", normuon_beta=0.9, cautious=True, adam_every=2, floor=0.1)
        | dict(momentum_warmup_frac=0.2, momentum_cooldown_frac=0.1),
    ),
    flags=dict(
        data=dict(batch_tokens=512, batch_schedule=(0.5, 0.5, 0.5, 1.0), seq_schedule=(0.5, 1.0)),
        model=dict(smear=True, attention_gate=True, mtp_weights=(0.5, 0.25), tie_frac=0.4),
        optim=dict(average_frac=0.5, average_decay=0.5, adam_every=2),
    ),
)
FEATURES["all"] = {t: FEATURES["speed"].get(t, {}) | FEATURES["flags"].get(t, {}) for t in ("data", "model", "optim")}


def tiny_config(corpus: Path, out: Path, features: str = "demo", **run) -> Config:
    chosen = FEATURES[features]
    tables = {name: {**table, **chosen.get(name, {})} for name, table in {**TINY, "optim": {}}.items()}
    tables["run"] |= dict(out_dir=str(out), **run)
    tables["data"] |= dict(shards=str(corpus))
    return validate(tables, "test")


def tiny_model(features: str = "demo", vocab_size: int = 50) -> train_gpt.GPT:
    """A model whose zero-initialised parts are not zero: those would hide what it must not do."""
    cfg = tiny_config(Path("."), Path("."), features)
    model = train_gpt.GPT(cfg.model, vocab_size)
    model.init_weights(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def rows_of(out: Path) -> list[dict]:
    """metrics.jsonl without the times and places, which may differ between equal runs."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("time_s", "wait_s", "tokens_per_second", "memory_gib"):
            row.pop(key, None)
    assert rows[0].pop("kind") == "run"
    return rows[1:]


def same_weights(a: Path, b: Path) -> bool:
    left, right = (train_gpt.load_checkpoint(path / "last.pt") for path in (a, b))
    states = [
        saved["model"] | {f"{n}.{k}": v for n, s in saved["optimizer"].items() for k, v in s.items()}
        for saved in (left, right)
    ]
    states = [
        state | {f"trained {name}": values for name, values in saved.get("trained", {}).items()}
        for state, saved in zip(states, (left, right), strict=True)
    ]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def same_losses(a: Path, b: Path) -> bool:
    """Within 1e-5 at every step: processes add up what is logged, not what is learned from, in another order."""
    rows = list(zip(rows_of(a), rows_of(b), strict=True))
    keys = ("step", "tokens", "train_nats", "val_nats")
    return all(x.get(key) == pytest.approx(y.get(key), abs=1e-5) for x, y in rows for key in keys)


# --- parts ------------------------------------------------------------------------------------------------------------


def plain_attention(q, k, v, bounds, scale, window=0):
    """One document, one head at a time, by the textbook, in float64."""
    out = torch.zeros_like(q)
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            scores = q[a:b, h] @ k[a:b, kv].T * scale
            back = torch.arange(b - a)[:, None] - torch.arange(b - a)
            seen = (back >= 0) & (back <= (window or b))
            out[a:b, h] = scores.masked_fill(~seen, -torch.inf).softmax(1) @ v[a:b, kv]
    return out


@pytest.mark.parametrize("bounds", [[0, 64, 128], [0, 1, 40, 41, 105, 200], [0, 7], [0, 32, 96, 128]])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("window", [0, 1, 5, 33, 63, 500])
def test_attention_stays_within_documents_and_windows(bounds, kv_heads, window):
    torch.manual_seed(0)
    bounds = np.array(bounds, np.int32)
    q, k, v = (torch.randn(int(bounds[-1]), h, 8, dtype=torch.float64) for h in (4, kv_heads, kv_heads))
    docs = train_gpt.documents(bounds, 200, CPU)
    found = train_gpt.attend(q, k, v, docs, 0.3, window)
    torch.testing.assert_close(found, plain_attention(q, k, v, bounds.tolist(), 0.3, window))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("window", [0, 20])
def test_attention_on_cuda_equals_cpu(window):
    torch.manual_seed(0)
    bounds = np.array([0, 1, 40, 41, 105, 200], np.int32)
    q, k, v = (torch.randn(200, 4, 64).bfloat16() for _ in range(3))
    docs = train_gpt.documents(bounds, 200, CPU)
    expected = train_gpt.attend(q.float(), k.float(), v.float(), docs, 0.12, window)
    cuda = torch.device("cuda")
    found = train_gpt.attend(q.to(cuda), k.to(cuda), v.to(cuda), train_gpt.documents(bounds, 200, cuda), 0.12, window)
    torch.testing.assert_close(found.float().cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("features", ["anchor", "speed", "all"])
def test_a_run_on_cuda_follows_one_on_a_cpu(tiny_corpus, tmp_path, features):
    """bf16 against fp32, rows filled up, everything compiled: the same losses within what bf16 costs."""
    for place, world in (("cpu", ONE), ("cuda", train_gpt.World())):
        train_gpt.train(tiny_config(tiny_corpus, tmp_path / place, features, steps=8), world)
    for ours, theirs in zip(rows_of(tmp_path / "cuda"), rows_of(tmp_path / "cpu"), strict=True):
        for key in ("train_nats", "val_nats", "rows_nats"):
            assert ours.get(key) == pytest.approx(theirs.get(key), abs=0.05)


@pytest.mark.parametrize("features", FEATURES)
def test_nothing_leaks_from_the_future_or_from_other_documents(features):
    model = tiny_model(features)
    docs = train_gpt.documents(np.array([0, 10, 25]), 64, CPU)
    tokens = torch.arange(25) % 50
    for changed, may_change in [(4, range(4, 10)), (9, range(9, 10)), (12, range(12, 25))]:
        other = tokens.clone()
        other[changed] = 49
        moved = (model.hidden(tokens, docs) - model.hidden(other, docs)).abs().amax(1) > 1e-6
        assert set(moved.nonzero()[:, 0].tolist()) == set(may_change)


def plain_hidden(model: train_gpt.GPT, tokens, bounds) -> torch.Tensor:
    """The whole model again, one document and one head at a time, with every technique as its definition says."""
    w = {name: values.detach().double() for name, values in model.named_parameters()}
    cfg, layers = model.cfg, model.cfg.num_layers
    half, quarter = cfg.head_dim // 2, cfg.head_dim // 4

    def norm(x, gain=None):
        y = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        return y if gain is None else y * w[gain]

    def affine(x, name, bias):
        return x @ w[name].T + w.get(bias, 0)

    outs = []
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        x = w["embed"][tokens[a:b]]
        if cfg.smear:
            gate = w["smear_mix"] * torch.sigmoid(x[1:, :12] @ w["smear_gate"].T)
            x = torch.cat([x[:1], x[1:] + gate * x[:-1]])
        x = x0 = norm(x, "embed_gain" if cfg.gains else None)
        kept = []
        for layer in range(layers):
            at = f"blocks.{layer}."
            if cfg.skip and layer == (layers + 1) // 2:
                x = x + w["skip_mix"] * kept[(layers - 1) // 4]
            if cfg.x0_mix:
                x = w[at + "x0_mix"][0] * x + w[at + "x0_mix"][1] * x0
            y = norm(x, at + "attn_gain" if cfg.gains else None)
            bias = w.get(at + "qkv_bias", torch.zeros(3 * cfg.model_dim)).view(3, -1)
            q, k, v = (y @ w[at + "qkv"][i].T + bias[i] for i in range(3))
            n = cfg.num_value_embeds
            table = layer if layer < n else layer - layers + n if layer >= layers - n else None
            if table is not None:
                mix = w[at + "value_mix"]
                v = mix[0] * v + mix[1] * w[f"value_embeds.{table}"][tokens[a:b]]
            is_long = layer == layers - 1 or cfg.window_pattern[layer % len(cfg.window_pattern)] == "L"
            window = cfg.window if is_long else cfg.short_window or cfg.window
            position = torch.arange(b - a)
            angle = position[:, None] * cfg.rope_base ** -torch.linspace(0, 1, quarter).double()
            heads = []
            for h in range(cfg.model_dim // cfg.head_dim):
                columns = slice(h * cfg.head_dim, (h + 1) * cfg.head_dim)
                turned = []
                for part in (q, k):
                    part = norm(part[:, columns]).clone()
                    one, two = part[:, :quarter].clone(), part[:, half : half + quarter].clone()
                    part[:, :quarter] = one * angle.cos() + two * angle.sin()
                    part[:, half : half + quarter] = two * angle.cos() - one * angle.sin()
                    turned.append(part)
                if cfg.key_offset and is_long:
                    for stays in (slice(quarter, half), slice(half + quarter, None)):
                        turned[1][1:, stays] = turned[1][:-1, stays].clone()
                scores = turned[0] @ turned[1].T * cfg.attention_scale
                back = position[:, None] - position
                scores = scores.masked_fill((back < 0) | (back > (window or b)), -torch.inf)
                out = scores.softmax(1) @ v[:, columns]
                if cfg.attention_gate:
                    out = out * 2 * torch.sigmoid(y[:, :12] @ w[at + "attn_gate"][h])[:, None]
                heads.append(out)
            x = x + affine(torch.cat(heads, 1), at + "attn_proj", at + "attn_proj_bias")
            y = norm(x, at + "mlp_gain" if cfg.gains else None)
            y = affine(y, at + "mlp_up", at + "mlp_up_bias").clamp(min=0) ** 2
            x = x + affine(y, at + "mlp_proj", at + "mlp_proj_bias")
            kept.append(x)
        if cfg.backout:
            x = x - w["backout_mix"] * kept[2 * layers // 3]
        outs.append(norm(x, "final_gain" if cfg.gains else None))
    return torch.cat(outs)


@pytest.mark.parametrize("features", FEATURES)
def test_the_model_is_what_its_techniques_say(features):
    model = tiny_model(features)
    torch.manual_seed(1)
    for values in model.parameters():  # gains and mixes off their first values, each another
        values.data += 0.1 * torch.randn_like(values)
    bounds = np.array([0, 1, 50, 64, 120])
    tokens = torch.randint(50, (120,))
    found = model.hidden(tokens, train_gpt.documents(bounds, 64, CPU))
    torch.testing.assert_close(found.double(), plain_hidden(model, tokens, bounds), rtol=1e-4, atol=1e-4)


def test_windows_limit_what_a_token_sees():
    """4 layers: 3 short windows of 3 tokens, one long one of 5: nothing from more than 14 tokens back; and half of it
    in the first half of the run. (The long layer takes half of each key from the token before: one more.)"""
    model = tiny_model("speed")
    for block in model.blocks:
        block.window = 5 if block.offsets_keys else 3
    docs = train_gpt.documents(np.array([0, 60]), 64, CPU)
    tokens = torch.arange(60) % 50
    other = tokens.clone()
    other[10] = 49
    for share, reach in [(1.0, 3 * 3 + 5), (0.5, 3 * 2 + 3)]:
        moved = (model.hidden(tokens, docs, share) - model.hidden(other, docs, share)).abs().amax(1) > 0
        assert moved.nonzero()[-1].item() == 10 + reach + 1
        assert moved.nonzero()[0].item() == 10


def test_key_offset_is_that_of_the_token_before_within_a_document():
    docs = train_gpt.documents(np.array([0, 2, 5]), 64, CPU)
    assert train_gpt.before(torch.arange(5), docs).tolist() == [0, 0, 2, 2, 3]
    assert train_gpt.before(torch.arange(10).view(5, 2), docs).tolist() == [[0, 1], [0, 1], [4, 5], [4, 5], [6, 7]]


@pytest.mark.parametrize("function", [fused.norm, fused.relu_squared])
def test_gradients_made_by_hand_are_those_of_autograd(function):
    plain = {fused.norm: lambda x: F.rms_norm(x, x.shape[-1:]), fused.relu_squared: lambda x: x.relu() ** 2}[function]
    torch.manual_seed(0)
    x, grad = torch.randn(2, 5, 3, 32, dtype=torch.float64)
    x = x[:, :2].requires_grad_()  # strided, as queries and keys are
    expected = plain(x)
    found = function(x)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y, x, grad[:, :2]) for y in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("cap", [0.0, 15.0, 80.0])
def test_head_loss_and_gradient_equal_autograd(cap):
    torch.manual_seed(0)
    hidden = torch.randn(700, 16, requires_grad=True)  # more than one block of rows
    head = (3 * torch.randn(40, 16)).requires_grad_()
    target = torch.randint(40, (700,))
    expected_T = F.cross_entropy(softcapped(hidden @ head.T, cap), target, reduction="none")
    expected = torch.autograd.grad(expected_T.sum() / 5, (hidden, head))
    found_T = train_gpt.HeadLoss.apply(hidden, head, None, target[None], torch.ones(1), cap)
    found = torch.autograd.grad(found_T.sum() / 5, (hidden, head))
    torch.testing.assert_close(found_T, expected_T)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_prediction_of_many_tokens_has_the_gradient_of_the_weighted_losses(cap):
    torch.manual_seed(0)
    bounds, weights = [0, 300, 302, 700], (1.0, 0.5, 0.25)
    hidden = torch.randn(700, 16, requires_grad=True)
    head, bias = (3 * torch.randn(40, 16)).requires_grad_(), torch.randn(40, requires_grad=True)
    target = torch.randint(40, (700,))
    logits = softcapped(hidden @ head.T + bias, cap)
    expected, later = torch.zeros(()), torch.full((3, 700), -1)
    for k, weight in enumerate(weights):
        for a, b in zip(bounds[:-1], bounds[1:], strict=True):
            later[k, a : b - k] = target[a + k : b]
            expected = expected + weight * F.cross_entropy(logits[a : b - k], target[a + k : b], reduction="sum")
    found_T = train_gpt.HeadLoss.apply(hidden, head, bias, later, torch.tensor(weights), cap)
    torch.testing.assert_close(found_T, F.cross_entropy(logits, target, reduction="none"))  # of the next token alone
    expected = torch.autograd.grad(expected, (hidden, head, bias))
    found = torch.autograd.grad(found_T.sum(), (hidden, head, bias))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # The model makes the same targets of a row of documents.
    model = tiny_model("flags", 40)
    seen = []
    apply, train_gpt.HeadLoss.apply = train_gpt.HeadLoss.apply, lambda *args: seen.append(args[3:5])
    try:
        model(target, target, train_gpt.documents(np.array(bounds), 512, CPU), 1.0, weights[1:])
    finally:
        train_gpt.HeadLoss.apply = apply
    assert torch.equal(seen[0][0], later) and seen[0][1].tolist() == list(weights)


def test_rows_filled_up_count_for_nothing():
    """What CUDA needs, on a CPU: the same losses and gradients, whatever fills a row."""
    model, rng = tiny_model(), np.random.default_rng(0)
    tokens = rng.integers(50, size=41).astype(np.uint16)
    part = Packed(tokens[:-1], tokens[1:], np.array([0, 17, 40], np.int32))
    plain = train_gpt.to_device(part, 64, CPU)
    filled = [torch.cat([x, torch.full((24,), fill)]) for x, fill in zip(plain[:2], (3, -1), strict=True)]
    docs = train_gpt.documents(np.array([0, 17, 40, 64]), 64, CPU)
    ahead = (0.5,)  # weights are looked at on CUDA, and where there are several
    nll_T = model(*plain, 1.0, ahead)
    nll_T.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found_T = model(*filled, docs, 1.0, ahead)
    found_T.sum().backward()
    torch.testing.assert_close(found_T[:40], nll_T)
    assert not found_T[40:].any()
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=1e-4, atol=1e-5)


def test_a_step_is_counted_in_multiplications():
    """6 per weight and token, and 12 D for every key a query sees, counted one by one."""
    model = tiny_model("speed")
    lengths = np.array([5, 64, 30])
    keys = sum(sum(min(t, block.window) + 1 for n in lengths for t in range(n)) for block in model.blocks) / 99
    weights = 4 * (4 * 32**2 + 8 * 32**2) + 50 * 32
    assert model.flops_per_token(lengths) == pytest.approx(6 * weights + 12 * 32 * keys)


@pytest.mark.parametrize(("polynomials", "iterations", "off"), [("jordan", 5, 0.35), ("simple", 12, 0.1)])
@pytest.mark.parametrize("shape", [(2, 24, 48), (2, 48, 24)])
def test_orthogonalised_matrices_have_singular_values_near_one(polynomials, iterations, off, shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(train_gpt.orthogonalise(torch.randn(shape), iterations, polynomials))
    assert ((values - 1).abs() < off).all()


def test_polar_express_reaches_small_singular_values():
    """A hundredth of the largest, within 5 iterations, where Jordan's quintic is still off."""
    torch.manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(1, 32, 32))
    G = U @ torch.diag(torch.logspace(0, -2, 32)) @ V
    found, other = (torch.linalg.svdvals(train_gpt.orthogonalise(G, 5, name)) for name in ("polar_express", "jordan"))
    assert (found - 1).abs().max() < 0.2 < (other - 1).abs().max()


def test_normuon_evens_out_rows_and_keeps_the_norm():
    """Against the definition, two steps, in float64; columns where there are more of them than rows."""
    torch.manual_seed(0)
    for shape, dim in [((2, 6, 4), -1), ((2, 4, 6), -2)]:
        updates = torch.randn(2, *shape, dtype=torch.float64) * torch.rand(shape[-2], 1) * torch.rand(shape[-1])
        second = torch.zeros_like(updates[0].mean(dim, keepdim=True))
        moments = torch.zeros_like(second)
        for update in updates:
            found = train_gpt.evened(update, second, 0.9)
            moments = 0.9 * moments + 0.1 * (update**2).mean(dim, keepdim=True)
            expected = update / moments.sqrt()
            for matrix, plain, even in zip(expected, update, found, strict=True):
                torch.testing.assert_close(even, matrix * plain.norm() / matrix.norm())
        torch.testing.assert_close(second, moments)


def test_cautious_decay_leaves_weights_alone_that_the_update_drives_out():
    torch.manual_seed(0)
    gradient = torch.randn(1, 8, 8)
    moved = {}
    for cautious, decay in [(False, 0.0), (False, 0.5), (True, 0.5)]:
        weight = torch.nn.Parameter(torch.ones(8, 8))
        muon([weight], muon_lr=0.1, muon_weight_decay=decay, cautious=cautious).step([gradient], 1.0, 0.9)
        moved[cautious, decay] = weight.detach()
    update = 1 - moved[False, 0.0]
    torch.testing.assert_close(moved[False, 0.5], 0.95 - update)
    torch.testing.assert_close(moved[True, 0.5], torch.where(update >= 0, 0.95, 1.0) - update)


@pytest.mark.parametrize("cautious", [False, True])
def test_adam_equals_torch_adam_on_the_sum_of_two_gradients(cautious):
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 8), torch.randn(4, 64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    cfg = Optim(adam_every=2, cautious=cautious, adam_weight_decay=0.2)
    mine = train_gpt.Adam([(0.1, [ours])], cfg, ONE)
    other = torch.optim.AdamW([theirs], lr=0.05, betas=cfg.adam_betas, eps=cfg.adam_eps, weight_decay=0.0)
    for step, gradient in enumerate(gradients):
        mine.step([gradient.clone()], 0.5, step)
        if step % 2:
            theirs.grad = (gradients[step - 1] + gradient).view(8, 8)
            before = theirs.detach().clone()
            if not cautious:
                with torch.no_grad():
                    theirs.mul_(1 - 0.05 * 0.2)
            other.step()
            if cautious:
                with torch.no_grad():
                    agree = other.state[theirs]["exp_avg"] * theirs >= 0
                    theirs.mul_(torch.where(agree, 1 - 0.05 * 0.2, 1.0))
            assert (theirs - before).abs().max() > 0
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_what_is_compiled_on_cuda_is_one_graph_and_stays_it(monkeypatch):
    """Traced on a CPU, compiled by nobody: graph breaks and recompilations show all the same."""
    traced = []
    trace = partial(
        torch.compile, dynamic=False, fullgraph=True, backend=lambda graph, _: traced.append(graph) or graph
    )
    model = tiny_model("speed")
    docs = train_gpt.documents(np.array([0, 32, 64]), 64, CPU)
    tokens = torch.arange(64) % 50
    expected = model.hidden(tokens, docs)
    hidden = trace(model.hidden)
    for seed in (0, 1, 0):
        model.init_weights(seed)
        torch.manual_seed(0)
        hidden(tokens, docs)
    assert len(traced) == 1
    model = tiny_model("speed")
    model.load_state_dict(tiny_model("speed").state_dict())
    torch.testing.assert_close(trace(model.hidden)(tokens, docs), expected)
    del traced[:]
    update = trace(train_gpt.muon_update)
    for lr in (0.1, 0.2, 0.3):
        weights, gradient = [torch.ones(2, 8, 16) for _ in range(2)], torch.randn(2, 8, 16)
        settings = (5, "polar_express", 0.9, 0.1, True)
        for weight, step, number in zip(weights, (update, train_gpt.muon_update), (torch.tensor, float), strict=True):
            state = torch.zeros(2, 8, 16), torch.zeros(2, 1, 16)
            step(weight, gradient, *state, number(lr), number(0.9), *settings)
        torch.testing.assert_close(*weights)
    assert len(traced) == 1


def test_every_parameter_is_in_one_group_and_a_view_of_what_is_stepped():
    for features in FEATURES:
        model = tiny_model(features)
        cfg = tiny_config(Path("."), Path("."), features).optim
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizers = train_gpt.Optimizers(model, cfg, ONE)
        assert all(torch.equal(values[name], p) for name, p in model.named_parameters())
        for bundle in optimizers.bundles:
            bundle.values.zero_()
        assert not any(p.any() for p in model.parameters())


def muon(parameters: list, **settings) -> train_gpt.Muon:
    return train_gpt.Muon(parameters, Optim(**settings), ONE)


def test_muon_equals_torch_muon():
    """torch.optim.Muon orthogonalises in bf16, ours in fp32 on a CPU: equal within bf16's precision."""
    torch.manual_seed(0)
    start, gradients = torch.randn(24, 48), torch.randn(3, 24, 48)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = muon([ours], muon_lr=0.1, muon_weight_decay=0.3)
    other = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.3)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        mine.step([gradient[None].clone()], scale=1.0, momentum=0.9)
        other.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_muon_steps_a_stack_like_single_matrices():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 16, 8))
    singles = [torch.nn.Parameter(m.clone()) for m in stack.detach()]
    gradient = torch.randn(3, 16, 8)
    settings = dict(muon_lr=0.1, muon_weight_decay=0.1, normuon_beta=0.9, cautious=True)
    muon([stack], **settings).step([gradient], 0.5, 0.9)
    for single, part in zip(singles, gradient, strict=True):
        muon([single], **settings).step([part[None]], 0.5, 0.9)
    torch.testing.assert_close(stack.detach(), torch.stack([s.detach() for s in singles]))


@pytest.mark.parametrize("features", ["demo", "anchor", "speed"])
def test_first_loss_is_ln_V(features):
    model = train_gpt.GPT(tiny_config(Path("."), Path("."), features).model, 50)
    model.init_weights(0)
    loss_T = model(torch.arange(20), torch.arange(20), train_gpt.documents(np.array([0, 20]), 64, CPU))
    torch.testing.assert_close(loss_T, torch.full((20,), np.log(50)), rtol=1e-5, atol=0)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_uses_every_token_once(tiny_corpus, tmp_path):
    cfg = tiny_config(tiny_corpus, tmp_path / "run")
    train_gpt.train(cfg, ONE)
    rows = rows_of(tmp_path / "run")
    nats = [row["train_nats"] for row in rows if "train_nats" in row]
    assert rows[-1]["step"] == len(nats) == -(-rows[-1]["tokens"] // 256)
    assert np.mean(nats[-3:]) < np.mean(nats[:3]) - 0.3
    work = train_gpt.prepare(cfg, print)
    assert rows[-1]["tokens"] == work.train.num_tokens == work.train.segments.num_tokens


@pytest.mark.parametrize("features", ["demo", "anchor", "all"])
def test_stopping_and_continuing_equals_never_stopping(tiny_corpus, tmp_path, features):
    steps = 5 if features == "all" else 8  # of up to twice as many tokens
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train_gpt.train(tiny_config(tiny_corpus, straight, features, steps=steps), ONE)
    stops = 0
    while not train_gpt.train(
        tiny_config(tiny_corpus, broken, features, steps=steps, max_seconds=1e-9), ONE
    ):  # each process stops after its first step
        stops += 1
    assert rows_of(broken) == rows_of(straight)
    assert stops == rows_of(straight)[-1]["step"] - 1
    assert same_weights(broken, straight)


def command(cfg: Config, folder: Path, *launcher: str) -> list[str]:
    """A command line that runs `cfg` in a process of its own."""
    toml = folder / f"config-{len(list(folder.iterdir()))}.toml"
    tables = cfg.model_dump(mode="json")
    lines = [f"[{t}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in tables[t].items()) for t in tables]
    toml.write_text("\n".join(lines))
    return [sys.executable, *launcher, str(ROOT / "train_gpt.py"), str(toml)]


def test_four_processes_agree_with_one_to_the_bit(tiny_corpus, tmp_path):
    """With every feature; and one goes on where the others stopped. Losses within 1e-5, and in fact the same bits."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun sets it: the number changes the last bits
    try:
        train_gpt.train(tiny_config(tiny_corpus, alone, "all", steps=11), ONE)
        assert rows_of(alone)[-1]["step"] == 20  # most batches are half as large
        cfg = tiny_config(tiny_corpus, shared, "all", steps=11, save_at=(0.6,))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
        line = command(cfg, tmp_path, *launcher)
        subprocess.run(line, cwd=ROOT, check=True, capture_output=True, env=ALONE | {"OMP_NUM_THREADS": "1"})
        assert same_losses(alone, shared)
        assert same_weights(alone, shared)
        middle = next(shared.glob("step*.pt"))
        for path in (shared / "last.pt", shared / "last-1.pt"):
            path.write_bytes(middle.read_bytes())
        train_gpt.train(cfg, ONE)
        assert same_weights(alone, shared)
    finally:
        torch.set_num_threads(threads)


def test_kept_checkpoints(tiny_corpus, tmp_path):
    train_gpt.train(tiny_config(tiny_corpus, tmp_path / "run", steps=10, save_at=(0.2, 1.0)), ONE)
    assert sorted(p.name for p in (tmp_path / "run").glob("step*.pt")) == ["step10.pt", "step2.pt"]
    assert train_gpt.load_checkpoint(tmp_path / "run" / "step2.pt")["step"] == 2


def refusal(cfg: Config) -> str:
    with pytest.raises(InputError) as error:
        train_gpt.train(cfg, ONE)
    return str(error.value)


def test_seeds_in_one_process_are_the_runs_of_many(tiny_corpus, tmp_path, monkeypatch):
    """And the model is made, hence compiled, once."""
    made = []
    gpt = train_gpt.GPT
    monkeypatch.setattr(train_gpt, "GPT", lambda *args: made.append(args) or gpt(*args))
    train_gpt.train(tiny_config(tiny_corpus, tmp_path / "both", "flags", steps=4, num_seeds=2, seed=3), ONE)
    assert len(made) == 1
    for seed in (3, 4):
        alone = tmp_path / f"alone{seed}"
        train_gpt.train(tiny_config(tiny_corpus, alone, "flags", steps=4, seed=seed), ONE)
        assert rows_of(tmp_path / "both" / f"seed{seed}") == rows_of(alone)
        assert same_weights(tmp_path / "both" / f"seed{seed}", alone)


def test_the_end_is_validated_under_both_protocols(tiny_corpus, tmp_path):
    """Rows of an anchor-like run and documents of another are the same tokens, each under its own mask."""
    finals = {}
    for features in ("demo", "anchor"):
        cfg = tiny_config(tiny_corpus, tmp_path / features, features, steps=3)
        train_gpt.train(cfg, ONE)
        finals[features] = rows_of(tmp_path / features)[-1]
        work = train_gpt.prepare(cfg, lambda _: None)
        model = train_gpt.GPT(cfg.model, 257)
        model.load_state_dict(train_gpt.load_checkpoint(tmp_path / features / "last.pt")["model"])
        for stream, kind in [
            (work.val, work.unit),
            (work.other_val, "window" if work.unit == "document" else "document"),
        ]:
            key = {"window": "rows_nats", "document": "documents_nats"}[kind]
            total, tokens = 0.0, 0
            for a, b in zip([0, *stream.end[:-1]], stream.end, strict=True):
                part = stream.read(a, min(b, 1000))
                total += model(*train_gpt.to_device(part, 64, CPU)).sum().item()
                tokens += len(part.input_T)
                if b >= 1000:
                    break
            assert tokens == 1000
            assert finals[features][key] == pytest.approx(total / tokens, rel=1e-5)
    assert finals["demo"]["val_nats"] == finals["demo"]["documents_nats"] != finals["demo"]["rows_nats"]
    assert finals["anchor"]["val_nats"] == finals["anchor"]["rows_nats"] != finals["anchor"]["documents_nats"]


def test_a_batch_schedule_uses_every_token_of_the_order_once(tiny_corpus, tmp_path):
    cfg = tiny_config(tiny_corpus, tmp_path / "run", "flags")
    work = train_gpt.prepare(cfg, print)
    assert work.tokens == work.train.num_tokens
    sizes = np.diff(work.plan.begin_S)
    assert set(sizes[:-1]) == {256, 512} and (np.diff(sizes[:-1]) >= 0).all()
    source = planned(work.train, work.plan, range(work.steps))
    placed = train_gpt.placed(source, work.plan, train_gpt.make_trainer(cfg, work, ONE))
    read = [part for batch in placed for part in batch.parts]
    whole = work.train.read(0, work.train.num_tokens)
    for i, expected in enumerate((whole.input_T, whole.target_T)):
        assert np.array_equal(torch.cat([part[i] for part in read]).numpy(), expected)
    longest = [part[2].position_T.max() for part in read]
    assert max(longest[: len(longest) // 3]) < 32 <= max(longest)


def test_embedding_and_head_are_one_table_until_they_part(tiny_corpus, tmp_path):
    cfg = tiny_config(tiny_corpus, tmp_path / "run", "flags", steps=8, save_at=(0.1, 0.3, 1.0))
    train_gpt.train(cfg, ONE)
    *tied, parted = (
        train_gpt.load_checkpoint(path)
        for path in sorted((tmp_path / "run").glob("step*.pt"), key=lambda path: int(path.stem[4:]))
    )
    for saved in tied:
        assert torch.equal(saved["model"]["embed"], saved["model"]["head"])
    assert not torch.equal(parted["trained"]["embed"], parted["trained"]["head"])


def test_the_average_is_that_of_the_last_steps(tiny_corpus, tmp_path):
    def weights(average_frac, decay, folder):
        cfg = tiny_config(tiny_corpus, tmp_path / folder, steps=6, save_at=tuple(k / 6 for k in range(1, 7)))
        optim = cfg.optim.model_copy(update=dict(average_frac=average_frac, average_decay=decay))
        train_gpt.train(cfg.model_copy(update={"optim": optim}), ONE)
        return [train_gpt.load_checkpoint(tmp_path / folder / f"step{k}.pt")["model"]["head"] for k in range(1, 7)]

    plain = weights(0.0, 0.0, "plain")
    even = weights(0.5, 0.0, "even")
    assert torch.equal(even[2], plain[2]) and torch.equal(even[3], plain[3])
    torch.testing.assert_close(even[5], (plain[3] + plain[4] + plain[5]) / 3)
    expected = 0.4 * (0.4 * plain[3] + 0.6 * plain[4]) + 0.6 * plain[5]
    torch.testing.assert_close(weights(0.5, 0.4, "ema")[5], expected)


def test_the_time_of_a_step_is_split_when_asked_for(tiny_corpus, tmp_path):
    train_gpt.train(tiny_config(tiny_corpus, tmp_path / "run", steps=6, split_times=True), ONE)
    *_, row = (row for row in rows_of(tmp_path / "run") if "train_nats" in row)
    spent = [row[f"{phase}_s"] for phase in train_gpt.PHASES]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert min(spent) > 0 and sum(spent) < lines[-1]["time_s"]
    train_gpt.train(tiny_config(tiny_corpus, tmp_path / "plain", steps=6), ONE)
    assert "forward_s" not in rows_of(tmp_path / "plain")[0]


def test_the_target_is_logged_where_it_is_reached(tiny_corpus, tmp_path, capsys):
    cfg = tiny_config(tiny_corpus, tmp_path / "run", steps=21, target_nats=5.3)
    train_gpt.train(cfg, ONE)
    rows = [row for row in rows_of(tmp_path / "run") if "val_nats" in row]
    reached = [row["val_nats"] <= 5.3 for row in rows]
    assert reached == sorted(reached) and True in reached
    tokens = [row["tokens"] for row in rows][reached.index(True)]
    assert [row.get("target_tokens") for row in rows] == [tokens if there else None for there in reached]
    assert capsys.readouterr().out.count("reached 5.3 nats") == 1


def test_rows_are_copied_to_loggers_that_were_asked_for(tiny_corpus, tmp_path, monkeypatch):
    """With stand-ins: neither package is a dependency."""
    wandb, tensorboard = [], []
    run = types.SimpleNamespace(log=lambda scalars, step: wandb.append((step, scalars)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **about: wandb.append(about) or run))
    writer = types.SimpleNamespace(add_scalar=lambda *scalar: tensorboard.append(scalar), flush=lambda: None)
    module = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train_gpt.train(tiny_config(tiny_corpus, tmp_path / "run", steps=3, wandb="offline", tensorboard=True), ONE)
    rows = rows_of(tmp_path / "run")
    about, *logged = wandb
    assert about["mode"] == "offline" and about["config"]["run"]["steps"] == 3
    assert [step for step, _ in logged] == [row["step"] for row in rows]
    for row, (_, scalars) in zip(rows, logged, strict=True):
        assert {k: v for k, v in scalars.items() if k in row} == {k: v for k, v in row.items() if k != "step"}
    assert {name for name, _, _ in tensorboard} >= {"train_nats", "val_nats", "tokens_per_second"}


@pytest.mark.parametrize(
    ("settings", "package"), [(dict(wandb="offline"), "wandb"), (dict(tensorboard=True), "tensorboard")]
)
def test_a_logger_that_is_not_installed_is_a_sentence(tiny_corpus, tmp_path, monkeypatch, settings, package):
    monkeypatch.setitem(sys.modules, "wandb" if package == "wandb" else "torch.utils.tensorboard", None)
    assert f"needs the package {package}" in refusal(tiny_config(tiny_corpus, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_a_killed_process_ends_the_others_with_a_sentence_and_the_run_goes_on(tiny_corpus, tmp_path):
    """Of two, the one that writes is killed (-9). One process alone then finishes, as if nothing had happened."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_gpt.train(tiny_config(tiny_corpus, straight, steps=20), ONE)
        cfg = tiny_config(tiny_corpus, broken, steps=20)
        line = command(cfg, tmp_path)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = dict(OMP_NUM_THREADS="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        first, other = (
            subprocess.Popen(line, cwd=ROOT, env=ALONE | where | {"RANK": str(rank)}, stdout=-3, stderr=-1, text=True)
            for rank in range(2)
        )
        metrics = broken / "metrics.jsonl"
        while first.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 6):
            time.sleep(0.005)
        first.send_signal(signal.SIGKILL)
        _, said = other.communicate(timeout=60)
        first.communicate()
        assert first.returncode == -signal.SIGKILL, "the run ended before it could be killed"
        assert other.returncode == 2
        assert "error: another process of this run was lost" in said and "Traceback" not in said
        assert len(rows_of(broken)) < len(rows_of(straight))
        train_gpt.train(cfg, ONE)
        assert same_losses(broken, straight)
        assert same_weights(broken, straight)
    finally:
        torch.set_num_threads(threads)


def test_a_port_in_use_is_a_sentence(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for key, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(key, value)
        with pytest.raises(InputError, match=f"cannot meet at 127.0.0.1:{port} .*; choose another MASTER_PORT"):
            train_gpt.World()
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(InputError, match="start the processes with torchrun"):
        train_gpt.World()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")]
)
def test_out_of_memory_names_the_knob(tiny_corpus, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(train_gpt.GPT, "forward", full)
    said = refusal(tiny_config(tiny_corpus, tmp_path / "run", steps=3))
    assert "out of memory" in said and "lower data.micro_batch_tokens, now 64" in said


def test_a_folder_that_cannot_be_written_is_a_sentence(tiny_corpus, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written (Not a directory)" in refusal(tiny_config(tiny_corpus, tmp_path / "file" / "run"))


def test_a_missing_validation_shard_is_a_sentence(tiny_corpus, tmp_path):
    cfg = tiny_config(tiny_corpus, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    data = cfg.data.model_copy(update={"val_shards": str(tmp_path / "empty")})
    assert "no shard named *_val_*.bin there" in refusal(cfg.model_copy(update={"data": data}))


def test_bad_input_is_refused_before_anything_is_written(tiny_corpus, tmp_path):
    cfg = tiny_config(tiny_corpus, tmp_path / "run", steps=10**6)
    assert "the order holds" in refusal(cfg)
    missing = cfg.model_copy(update={"data": cfg.data.model_copy(update={"shards": "nowhere"})})
    assert "nowhere: no such shard" in refusal(missing)
    order = cfg.model_copy(update={"data": cfg.data.model_copy(update={"order": "none.npy"})})
    assert "none.npy: no such order" in refusal(order)
    assert not (tmp_path / "run").exists()


def test_a_run_begins_from_a_checkpoint_of_its_own_kind_only(tiny_corpus, tmp_path):
    """Its first row validates what the parent's last one did; another model, or no file, is a sentence."""
    train_gpt.train(tiny_config(tiny_corpus, tmp_path / "parent", steps=4), ONE)
    parent = str(tmp_path / "parent" / "last.pt")
    branch = tiny_config(tiny_corpus, tmp_path / "branch", steps=2, init_from=parent)
    train_gpt.train(branch, ONE)
    begun, ended = rows_of(tmp_path / "branch")[0], rows_of(tmp_path / "parent")[-1]
    assert (begun["step"], begun["val_nats"]) == (0, ended["val_nats"])
    digests = {
        json.loads((tmp_path / f / "config.json").read_text())["identity"]["digest"] for f in ("parent", "branch")
    }
    assert len(digests) == 2
    with pytest.raises(InputError, match="run.init_from .* of another model or optimizer"):
        train_gpt.train(tiny_config(tiny_corpus, tmp_path / "x", "speed", steps=2, init_from=parent), ONE)
    with pytest.raises(InputError, match="run.init_from nosuch.pt: no such checkpoint"):
        train_gpt.train(tiny_config(tiny_corpus, tmp_path / "y", steps=2, init_from="nosuch.pt"), ONE)


def test_another_runs_folder_is_refused_and_left_alone(tiny_corpus, tmp_path):
    out = tmp_path / "run"
    train_gpt.train(tiny_config(tiny_corpus, out, steps=3), ONE)
    before = {p: p.read_bytes() for p in out.iterdir()}
    for other in (dict(steps=4), dict(steps=3, seed=1), dict(steps=3, name="other")):
        assert "choose another run.out_dir" in refusal(tiny_config(tiny_corpus, out, **other))
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    assert "not a run folder" in refusal(tiny_config(tiny_corpus, tmp_path / "papers", steps=3))
    assert before == {p: p.read_bytes() for p in out.iterdir()}


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tiny_corpus, tmp_path, capsys):
    out = tmp_path / "run"
    cfg = tiny_config(tiny_corpus, out, steps=3, keep_checkpoints=3)
    train_gpt.train(cfg, ONE)
    rows, weights = rows_of(out), train_gpt.load_checkpoint(out / "last.pt")["model"]
    steps = {path.name: train_gpt.load_checkpoint(path)["step"] for path in sorted(out.glob("last*.pt"))}
    assert steps == {"last.pt": 3, "last-1.pt": 2, "last-2.pt": 1}
    for name in ("last.pt", "last-1.pt"):  # one cut short, one with a changed bit in the middle of a tensor
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 1
        (out / name).write_bytes(data[:1000] if name == "last.pt" else data)
    train_gpt.train(cfg, ONE)
    said = capsys.readouterr().out
    assert "last.pt: not a readable checkpoint" in said and "the checksum of " in said
    assert "continuing at step 1 of 3" in said
    assert rows_of(out) == rows
    again = train_gpt.load_checkpoint(out / "last.pt")["model"]
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_damaged_checkpoints_alone_are_a_sentence(tiny_corpus, tmp_path):
    out = tmp_path / "run"
    train_gpt.train(tiny_config(tiny_corpus, out, steps=3), ONE)
    for path in out.glob("last*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert "not a readable checkpoint, and no older one" in refusal(tiny_config(tiny_corpus, out, steps=3))
    assert len(list(out.glob("last*.pt"))) == 2, "nothing is put aside that may still be of use"


def test_divergence_is_a_sentence_and_leaves_a_good_checkpoint(tiny_corpus, tmp_path):
    cfg = tiny_config(tiny_corpus, tmp_path / "run", steps=20, log_every=3, save_at=(0.2,))
    wild = dict(embed_lr=1e30, muon_lr=1e30, warmup_frac=0.2, cooldown_frac=0.5)
    said = refusal(cfg.model_copy(update={"optim": cfg.optim.model_copy(update=wild)}))
    assert "at step" in said and "the run diverged; lower the learning rates" in said
    for path in (tmp_path / "run").glob("*.pt"):
        assert all(torch.isfinite(x).all() for x in train_gpt.load_checkpoint(path)["model"].values())


def test_a_loss_worse_than_guessing_is_divergence(tiny_corpus, tmp_path, monkeypatch):
    loss = fused.block_loss
    steps = []

    def worse(*args):
        steps.append(args)
        nll, grad = loss(*args)
        return nll + 3 * (len(steps) > 30), grad

    monkeypatch.setattr(fused, "block_loss", worse)
    assert "the loss is 7.8" in refusal(tiny_config(tiny_corpus, tmp_path / "run", steps=20))


# --- one technique at a time ------------------------------------------------------------------------------------------


def test_variants_lack_one_technique_each(tmp_path):
    """Every technique a preset has is left out once, and nothing else changes; off ones are not run twice."""
    for features, number in [("demo", 3), ("speed", 14), ("flags", 9)]:
        cfg = tiny_config(tmp_path, tmp_path, features)
        found = ablate.variants(cfg)
        assert found.pop("nothing") == cfg
        for technique, variant in found.items():
            tables, other = cfg.model_dump(), variant.model_dump()
            changed = {f"{t}.{k}" for t in tables for k in tables[t] if tables[t][k] != other[t][k]}
            assert changed and changed <= ablate.WITHOUT[technique].keys()
        assert len(found) >= number, sorted(found)


def test_the_ablation_table_is_that_of_the_runs(tiny_corpus, tmp_path, capsys):
    base = tmp_path / "ablation"
    cfg = tiny_config(tiny_corpus, base, steps=3, num_seeds=2)
    ran = []
    ablate.ablate(cfg, lambda variant: ran.append(variant) or train_gpt.train(variant, ONE), True)
    assert [variant.run.name for variant in ran][:2] == ["tiny-without-nothing", "tiny-without-document-mask"]
    lines = (base / "table.md").read_text().splitlines()
    assert "n = 2 seeds" in lines[0] and "768 tokens" in lines[0]
    found = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in lines[4:]}
    assert found.keys() == ablate.variants(cfg).keys()
    losses = {}
    for name in found:
        runs = [rows_of(base / name.replace(" ", "-") / f"seed{seed}")[-1]["documents_nats"] for seed in (0, 1)]
        losses[name] = np.mean(runs)
        assert found[name][0] == f"{losses[name]:.4f}" and found[name][1] == f"{np.std(runs, ddof=1):.4f}"
    assert list(found) == sorted(losses, key=lambda name: -losses[name])
    assert found["softcap"][2].startswith(f"{losses['softcap'] - losses['nothing']:+.4f} ± ")
    # The same command runs nothing again.
    before = {path: path.stat().st_mtime_ns for path in base.rglob("last.pt")}
    ablate.ablate(cfg, lambda variant: train_gpt.train(variant, ONE), True)
    assert before == {path: path.stat().st_mtime_ns for path in base.rglob("last.pt")}
    # Time is up: it says where, and writes no table.
    (base / "table.md").unlink()
    ablate.ablate(cfg, lambda variant: "softcap" not in variant.run.name, True)
    assert not (base / "table.md").exists() and "stopped at the variant without softcap" in capsys.readouterr().out
