"""HellaSwag by hand: losses of endings against one document at a time, and answers that are known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt
from data.cli import InputError
from data.shards import open_corpus
from data.tokenizer import of_corpus
from scripts import hellaswag
from tests.test_train_gpt import ONE, tiny_config


@pytest.fixture(scope="module")
def run(tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hellaswag") / "run"
    train_gpt.train(tiny_config(tiny_corpus, folder, steps=4), ONE)
    return folder


def write(path, questions):
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return str(path)


QUESTIONS = [
    dict(ctx="the cat", endings=["sat.", "is a ship in the sea", "x", "the the"], label=0),
    dict(ctx="A man opens a door. He", endings=["eats the door", "goes in", "naps", "is tall and is tall"], label="1"),
]


def test_endings_are_scored_alone_and_masked(tiny_corpus, tmp_path, run, capsys):
    """Every ending by itself, one document at a time, by the trainer's own model."""
    path = write(tmp_path / "q.jsonl", QUESTIONS)
    hellaswag.main(str(run), path, shards=str(tiny_corpus), row_tokens=64)
    said = capsys.readouterr().out.splitlines()
    corpus = open_corpus(tiny_corpus, quiet=True)
    encoding = of_corpus(corpus)
    saved = train_gpt.load_checkpoint(run / "last.pt")
    model = train_gpt.GPT(tiny_config(tiny_corpus, run).model, saved["vocab_size"])
    model.load_state_dict(saved["model"])
    right, right_mean = 0, 0
    for question in QUESTIONS:
        nats, means = [], []
        for ending in question["endings"]:
            scene, told = (encoding.encode_ordinary(x) for x in (question["ctx"], " " + ending))
            tokens = torch.tensor([corpus.bos_id, *scene, *told])
            docs = train_gpt.documents(np.array([0, len(tokens) - 1]), 64, torch.device("cpu"))
            nll = model(tokens[:-1], tokens[1:], docs)[-len(told) :].sum().item()
            nats.append(nll)
            means.append(nll / len(told))
        right += nats.index(min(nats)) == int(question["label"])
        right_mean += means.index(min(means)) == int(question["label"])
    assert [float(line.split()[1]) for line in said] == [right / 2, right_mean / 2]


def test_packing_changes_no_loss():
    """A made-up loss that depends on token and place: what is packed together must not matter."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 50, size=rng.integers(4, 20)) for _ in range(40)]
    ending_lens = np.array([rng.integers(1, len(x) - 1) for x in tokens])

    def moments(input_T, target_T, bounds):
        position_T = np.concatenate([np.arange(n) for n in np.diff(bounds)])
        assert np.array_equal(input_T[position_T > 0], target_T[:-1][position_T[1:] > 0])
        return SimpleNamespace(nll_N=torch.from_numpy(target_T * 100.0 + position_T))

    expected = [
        sum(100 * x[i] + i - 1 for i in range(len(x) - n, len(x))) for x, n in zip(tokens, ending_lens, strict=True)
    ]
    for row_tokens in (20, 57, 10_000):
        np.testing.assert_allclose(hellaswag.ending_nats(tokens, ending_lens, moments, row_tokens), expected)


def test_length_normalisation_can_turn_an_answer():
    sums, lens = np.array([[3.0, 4.0]]), np.array([[1, 4]])
    assert hellaswag.accuracy(sums, np.array([1])) == 0.0
    assert hellaswag.accuracy(sums / lens, np.array([1])) == 1.0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the file is empty"),
        ("{", "line 1 is not JSON"),
        ('{"ctx": "a", "endings": ["b"]}', "row 1 has no ctx, endings and label"),
        ('{"ctx": "a", "endings": ["b"], "label": ""}', "row 1 has no ctx, endings and label"),
        ('{"ctx": "a", "endings": ["b"], "label": 0}', "row 1 has 1 endings"),
        ('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 7}', "and 7 is right"),
    ],
)
def test_a_file_that_is_not_hellaswag_is_a_sentence(tmp_path, text, sentence):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(InputError, match=sentence):
        list(hellaswag.read_questions(str(tmp_path / "q.jsonl")))


def test_a_missing_file_is_a_sentence():
    with pytest.raises(InputError, match="gone.jsonl: no such file; HellaSwag's"):
        list(hellaswag.read_questions("gone.jsonl"))
