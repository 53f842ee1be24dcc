"""The examples run on tiny data, go on where they stopped, and learn from exactly the predictions of the order."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from curriculum.loader import Rows, Stream
from data.cli import InputError
from data.segments import corpus_segments
from data.shards import open_corpus
from examples import hf_trainer, nanogpt_loop

SMALL = dict(seq_len=48, batch_rows=4, width=16, layers=1, heads=2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def test_the_plain_loop_learns_and_goes_on_exactly(tiny_corpus, tmp_path, capsys):
    nanogpt_loop.main(tiny_corpus, out=tmp_path / "whole.pt", **SMALL)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    losses = [float(line.split()[-1]) for line in lines]
    assert lines[-1].startswith("step 32/32") and losses[-1] < losses[0] - 0.1  # 5,998 tokens in batches of 192
    for steps in (7, 7, 20, 0):
        nanogpt_loop.main(tiny_corpus, out=tmp_path / "parts.pt", steps=steps, **SMALL)
    assert "going on at step 20 of 32" in capsys.readouterr().out
    whole, parts = weights(tmp_path / "whole.pt"), weights(tmp_path / "parts.pt")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_plain_loop_refuses_a_checkpoint_of_another_corpus(make_tiny_corpus, tiny_corpus, tmp_path):
    other = make_tiny_corpus(tmp_path / "other", seed=1)
    nanogpt_loop.main(tiny_corpus, out=tmp_path / "a.pt", steps=1, **SMALL)
    with pytest.raises(InputError, match="the state is of another order"):
        nanogpt_loop.main(other, out=tmp_path / "a.pt", steps=2, **SMALL)


@pytest.fixture(scope="module")
def stream(tiny_corpus):
    corpus = open_corpus(tiny_corpus)
    segments = corpus_segments(corpus, 40)
    return Stream(corpus, segments, np.random.default_rng(0).permutation(len(segments)))


def tiny_gpt2(vocab_size: int):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(use_cache=False, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab_size, **shape))
    return model.double().eval()


def test_a_models_loss_on_a_row_is_that_of_its_documents_one_by_one(stream):
    """Labels, the model's own shift, positions and mask together: float64, against each document alone."""
    model = tiny_gpt2(stream.corpus.vocab_size)
    last_two = slice(-2, None)  # of 5,998 = 39 * 150 + 148 tokens, so that filled-up rows are among them
    rows, packed = (list(Rows(stream, 150, batch_rows=2, format=f))[last_two] for f in ("hf", "packed"))
    assert len(packed[0]["input_ids"]) < 150
    batch = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
    with torch.no_grad():
        found = model(**batch).loss.item()
        total, num_tokens = 0.0, 0
        for row in packed:
            edges = row["bounds"].tolist()
            for a, b in zip(edges[:-1], edges[1:], strict=True):
                logits = model(input_ids=torch.from_numpy(row["input_ids"][None, a:b])).logits[0]
                target = torch.from_numpy(row["targets"][a:b])
                total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
                num_tokens += b - a
    # transformers takes its loss in float32 whatever the model's type.
    assert found == pytest.approx(total / num_tokens, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_hugging_faces_trainer_learns_and_goes_on_exactly(tiny_corpus, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    settings = SMALL | dict(steps=31, save_every=10)
    hf_trainer.main(tiny_corpus, out=tmp_path / "whole", **settings)
    log = json.loads((tmp_path / "whole/checkpoint-31/trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0] - 0.05
    shutil.copytree(tmp_path / "whole/checkpoint-10", tmp_path / "parts/checkpoint-10")
    hf_trainer.main(tiny_corpus, out=tmp_path / "parts", **settings)
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
