"""The trainer: its parts against plain formulas, and runs that are killed, stopped, shared out and refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
from curriculum.config import Config, Optim, validate
from curriculum.moments import softcapped
from data.cli import InputError

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
TINY = dict(
    run=dict(name="tiny", checkpoint_seconds=1e-9, log_every=1),
    data=dict(seq_len=64, batch_tokens=256, micro_batch_tokens=64, val_tokens=1000, val_every=7),
    model=dict(num_layers=2, model_dim=32, head_dim=16, num_value_embeds=1),
)


def tiny_config(corpus: Path, out: Path, **run) -> Config:
    tables = {name: dict(table) for name, table in TINY.items()}
    tables["run"] |= dict(out_dir=str(out), **run)
    tables["data"] |= dict(shards=str(corpus))
    return validate(tables, "test")


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
        {**saved["model"], **{f"{n}.{k}": v for n, s in saved["optimizer"].items() for k, v in s.items()}}
        for saved in (left, right)
    ]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


# --- parts ------------------------------------------------------------------------------------------------------------


def plain_attention(q, k, v, bounds, scale):
    """One document, one head at a time, by the textbook, in float64."""
    out = torch.zeros_like(q)
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            scores = q[a:b, h] @ k[a:b, kv].T * scale
            causal = torch.ones(b - a, b - a).tril().bool()
            out[a:b, h] = scores.masked_fill(~causal, -torch.inf).softmax(1) @ v[a:b, kv]
    return out


@pytest.mark.parametrize("bounds", [[0, 64, 128], [0, 1, 40, 41, 105, 200], [0, 7], [0, 32, 96, 128]])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_stays_within_documents(bounds, kv_heads):
    torch.manual_seed(0)
    bounds = np.array(bounds, np.int32)
    q, k, v = (torch.randn(int(bounds[-1]), h, 8, dtype=torch.float64) for h in (4, kv_heads, kv_heads))
    docs = train_gpt.documents(bounds, 200, CPU)
    found = train_gpt.attend(q, k, v, docs, 0.3)
    torch.testing.assert_close(found, plain_attention(q, k, v, bounds.tolist(), 0.3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_attention_on_cuda_equals_cpu():
    torch.manual_seed(0)
    bounds = np.array([0, 1, 40, 41, 105, 200], np.int32)
    q, k, v = (torch.randn(200, 4, 64).bfloat16() for _ in range(3))
    docs = train_gpt.documents(bounds, 200, CPU)
    expected = train_gpt.attend(q.float(), k.float(), v.float(), docs, 0.12)
    cuda = torch.device("cuda")
    found = train_gpt.attend(q.to(cuda), k.to(cuda), v.to(cuda), train_gpt.documents(bounds, 200, cuda), 0.12)
    torch.testing.assert_close(found.float().cpu(), expected, atol=2e-2, rtol=2e-2)


def test_nothing_leaks_from_the_future_or_from_other_documents():
    cfg = validate(dict(model=TINY["model"], data=TINY["data"]), "test").model
    model = train_gpt.GPT(cfg, 50)
    model.init_weights(0)
    for parameter in model.parameters():  # zero-init projections would hide any leak
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    docs = train_gpt.documents(np.array([0, 10, 25]), 64, CPU)
    tokens = torch.arange(25) % 50
    for changed, may_change in [(4, range(4, 10)), (12, range(12, 25))]:
        other = tokens.clone()
        other[changed] = 49
        moved = (model.hidden(tokens, docs) - model.hidden(other, docs)).abs().amax(1) > 1e-6
        assert set(moved.nonzero()[:, 0].tolist()) == set(may_change)


@pytest.mark.parametrize("cap", [0.0, 15.0])
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


def muon(parameters: list, **settings) -> train_gpt.Muon:
    return train_gpt.Muon(parameters, Optim(**settings), train_gpt.World())


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


def test_first_loss_is_ln_V():
    cfg = validate(dict(model=TINY["model"], data=TINY["data"]), "test").model
    model = train_gpt.GPT(cfg, 50)
    model.init_weights(0)
    loss_T = model(torch.arange(20), torch.arange(20), train_gpt.documents(np.array([0, 20]), 64, CPU))
    torch.testing.assert_close(loss_T, torch.full((20,), np.log(50)), rtol=1e-5, atol=0)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_uses_every_token_once(tiny_corpus, tmp_path):
    cfg = tiny_config(tiny_corpus, tmp_path / "run")
    train_gpt.train(cfg, train_gpt.World())
    rows = rows_of(tmp_path / "run")
    nats = [row["train_nats"] for row in rows if "train_nats" in row]
    assert rows[-1]["step"] == len(nats) == -(-rows[-1]["tokens"] // 256)
    assert np.mean(nats[-3:]) < np.mean(nats[:3]) - 0.3
    work = train_gpt.prepare(cfg, print)
    assert rows[-1]["tokens"] == work.train.num_tokens == work.train.segments.num_tokens


def test_stopping_and_continuing_equals_never_stopping(tiny_corpus, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train_gpt.train(tiny_config(tiny_corpus, straight), train_gpt.World())
    for _ in range(100):  # each process stops after its first step
        train_gpt.train(tiny_config(tiny_corpus, broken, max_seconds=1e-9), train_gpt.World())
        if rows_of(broken)[-1].get("val_nats") and rows_of(broken)[-1]["step"] == rows_of(straight)[-1]["step"]:
            break
    assert rows_of(broken) == rows_of(straight)
    assert same_weights(broken, straight)


def command(cfg: Config, folder: Path, *launcher: str) -> list[str]:
    """A command line that runs `cfg` in a process of its own."""
    toml = folder / f"config-{len(list(folder.iterdir()))}.toml"
    tables = cfg.model_dump(mode="json")
    lines = [f"[{t}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in tables[t].items()) for t in tables]
    toml.write_text("\n".join(lines))
    return [sys.executable, *launcher, str(ROOT / "train_gpt.py"), str(toml)]


def test_killed_mid_run_continues_with_identical_losses(tiny_corpus, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train_gpt.train(tiny_config(tiny_corpus, straight), train_gpt.World())
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    line = command(tiny_config(tiny_corpus, killed), tmp_path)
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    metrics = killed / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 6):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert rows_of(killed) != rows_of(straight)
    subprocess.run(line, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert rows_of(killed) == rows_of(straight)
    assert same_weights(killed, straight)


def test_two_processes_agree_with_one(tiny_corpus, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun sets it: the number changes the last bits
    subprocess.run(command(tiny_config(tiny_corpus, alone, steps=20), tmp_path), cwd=ROOT, check=True, env=one_thread)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = command(tiny_config(tiny_corpus, shared, steps=20), tmp_path, *launcher)
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True, env=one_thread)
    for mine, theirs in zip(rows_of(alone), rows_of(shared), strict=True):
        for key in ("train_nats", "val_nats"):
            assert mine.get(key) == pytest.approx(theirs.get(key), abs=1e-5)


def test_kept_checkpoints(tiny_corpus, tmp_path):
    train_gpt.train(tiny_config(tiny_corpus, tmp_path / "run", steps=10, save_at=(0.2, 1.0)), train_gpt.World())
    assert sorted(p.name for p in (tmp_path / "run").glob("step*.pt")) == ["step10.pt", "step2.pt"]
    assert train_gpt.load_checkpoint(tmp_path / "run" / "step2.pt")["step"] == 2


def refusal(cfg: Config) -> str:
    with pytest.raises(InputError) as error:
        train_gpt.train(cfg, train_gpt.World())
    return str(error.value)


def test_bad_input_is_refused_before_anything_is_written(tiny_corpus, tmp_path):
    cfg = tiny_config(tiny_corpus, tmp_path / "run", steps=10**6)
    assert "the order holds" in refusal(cfg)
    missing = cfg.model_copy(update={"data": cfg.data.model_copy(update={"shards": "nowhere"})})
    assert "nowhere: no such shard" in refusal(missing)
    order = cfg.model_copy(update={"data": cfg.data.model_copy(update={"order": "none.npy"})})
    assert "none.npy: no such order" in refusal(order)
    assert not (tmp_path / "run").exists()


def test_another_runs_folder_is_refused_and_left_alone(tiny_corpus, tmp_path):
    out = tmp_path / "run"
    train_gpt.train(tiny_config(tiny_corpus, out, steps=3), train_gpt.World())
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
    train_gpt.train(cfg, train_gpt.World())
    rows, weights = rows_of(out), train_gpt.load_checkpoint(out / "last.pt")["model"]
    steps = {path.name: train_gpt.load_checkpoint(path)["step"] for path in sorted(out.glob("last*.pt"))}
    assert steps == {"last.pt": 3, "last-1.pt": 2, "last-2.pt": 1}
    for name in ("last.pt", "last-1.pt"):  # one cut short, one with a changed bit in the middle of a tensor
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 1
        (out / name).write_bytes(data[:1000] if name == "last.pt" else data)
    train_gpt.train(cfg, train_gpt.World())
    said = capsys.readouterr().out
    assert "last.pt: not a readable checkpoint" in said and "the checksum of " in said
    assert "continuing at step 1 of 3" in said
    assert rows_of(out) == rows
    again = train_gpt.load_checkpoint(out / "last.pt")["model"]
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_damaged_checkpoints_alone_are_a_sentence(tiny_corpus, tmp_path):
    out = tmp_path / "run"
    train_gpt.train(tiny_config(tiny_corpus, out, steps=3), train_gpt.World())
    for path in out.glob("last*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert "not a readable checkpoint, and no older one" in refusal(tiny_config(tiny_corpus, out, steps=3))
    assert len(list(out.glob("last*.pt"))) == 2, "nothing is put aside that may still be of use"


def test_divergence_is_a_sentence(tiny_corpus, tmp_path):
    cfg = tiny_config(tiny_corpus, tmp_path / "run", steps=20)
    wild = cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"embed_lr": 1e30, "muon_lr": 1e30})})
    assert "diverged" in refusal(wild)
