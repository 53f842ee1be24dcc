"""References through `transformers`: tiny random models, packed by us, against their own logits, one by one."""

import numpy as np
import pytest
import torch

from curriculum.reference import open_reference
from data.cli import InputError
from data.shards import open_corpus

transformers = pytest.importorskip("transformers")
VOCAB = 257


def configs() -> dict:
    small = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    llama = dict(intermediate_size=48, max_position_embeddings=128, num_key_value_heads=2)
    return dict(
        llama_untied=transformers.LlamaConfig(**small, **llama, tie_word_embeddings=False),
        llama_tied=transformers.LlamaConfig(**small, **llama, tie_word_embeddings=True),
        gpt2=transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        phi_with_bias=transformers.PhiConfig(**small, intermediate_size=48, max_position_embeddings=128),
    )


def saved(config, folder, seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # the usual 0.02 makes every prediction uniform
            parameter.mul_(5 if parameter.ndim == 2 else 1)
            if name == "lm_head.bias":
                parameter.normal_()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", configs())
def test_packed_moments_equal_the_models_own(kind, tiny_corpus, tmp_path):
    model = saved(configs()[kind], tmp_path / kind)
    reference = open_reference(str(tmp_path / kind), open_corpus(tiny_corpus), 64, device="cpu")
    bounds = np.array([0, 1, 40, 104, 130])
    tokens = np.random.default_rng(0).integers(0, VOCAB, 131)
    found = reference.moments(tokens[:-1], tokens[1:], bounds)
    at = 0
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        with torch.no_grad():
            logp = model(torch.tensor(tokens[a:b])[None]).logits[0].double().log_softmax(1)
        H = -(logp.exp() * logp).sum(1)
        V = (logp.exp() * (logp + H[:, None]) ** 2).sum(1)
        nll = -logp[torch.arange(b - a), torch.tensor(tokens[a + 1 : b + 1])]
        for ours, theirs in zip(found, (nll, H, V), strict=True):
            torch.testing.assert_close(ours[at : at + b - a].double(), theirs, rtol=1e-4, atol=1e-5)
        at += b - a


def test_other_vocabularies_positions_and_damage_are_refused(tiny_corpus, tmp_path):
    corpus = open_corpus(tiny_corpus)
    config = configs()["gpt2"]
    saved(config, tmp_path / "good")
    with pytest.raises(InputError, match="sees at most 128 tokens, --max-len is 256"):
        open_reference(str(tmp_path / "good"), corpus, 256, device="cpu")
    config.vocab_size = 1000
    saved(config, tmp_path / "large")
    with pytest.raises(InputError, match="1000 token ids.*257"):
        open_reference(str(tmp_path / "large"), corpus, 64, device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a model directory"):
        open_reference(str(tmp_path / "empty"), corpus, 64, device="cpu")


def test_logits_we_do_not_compute_are_refused(tiny_corpus, tmp_path):
    """Granite divides its logits by a number we know nothing of: found out by comparing, not by name."""
    config = transformers.GraniteConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        logits_scaling=3.0,
        max_position_embeddings=128,
    )
    saved(config, tmp_path / "granite")
    with pytest.raises(InputError, match="its own logits differ"):
        open_reference(str(tmp_path / "granite"), open_corpus(tiny_corpus), 64, device="cpu")


def test_two_references_at_once_do_not_mix_their_documents(tiny_corpus, tmp_path):
    """transformers' registry of attention functions is global: each reference must keep its own."""
    corpus = open_corpus(tiny_corpus)
    row = np.random.default_rng(0).integers(0, VOCAB, 61)
    bounds = np.array([0, 10, 60])
    names = ("gpt2", "llama_tied")
    for kind in names:
        saved(configs()[kind], tmp_path / kind)
    alone = [
        open_reference(str(tmp_path / k), corpus, 64, device="cpu").moments(row[:-1], row[1:], bounds) for k in names
    ]
    both = [open_reference(str(tmp_path / k), corpus, 64, device="cpu") for k in names]
    both[1].moments(row[:-1], row[1:], np.array([0, 30, 60]))
    for expected, reference in zip(alone, both, strict=True):
        torch.testing.assert_close(reference.moments(row[:-1], row[1:], bounds), expected)


def test_a_revision_is_pinned_and_recorded(tiny_corpus, tmp_path, monkeypatch):
    """NAME@REVISION of the Hub, played here by a folder; a folder with an @ in its name is that folder."""
    corpus = open_corpus(tiny_corpus)
    asked = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def from_hub(name, revision, **options):
        asked.append((str(name), revision))
        return load(tmp_path / "hub" if name == "someone/model" else name, **options)

    def tokenizer_from_hub(name, revision):
        asked.append((str(name), revision))
        raise OSError("no tokenizer there")

    saved(configs()["gpt2"], tmp_path / "hub")
    saved(configs()["gpt2"], tmp_path / "model@home")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_hub)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer_from_hub)
    about = open_reference("someone/model@refs/pr/7", corpus, 64, device="cpu").about
    assert (about["name"], about["revision"]) == ("someone/model", "refs/pr/7")
    assert open_reference("someone/model", corpus, 64, device="cpu").about["revision"] is None
    folder = str(tmp_path / "model@home")
    assert open_reference(folder, corpus, 64, device="cpu").about["name"] == folder
    assert asked == [
        (n, r) for n, r in [("someone/model", "refs/pr/7"), ("someone/model", "main"), (folder, "main")] for _ in "12"
    ]
