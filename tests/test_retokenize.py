"""A reference with another tokenizer: nothing lost, nothing twice, and with the same tokenizer the same numbers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curriculum import retokenize
from curriculum.measures import MODEL_MEASURES, model_measures
from curriculum.reference import open_reference
from curriculum.retokenize import (
    describe,
    find_texts,
    open_retokenizer,
    readable,
    reference_stream,
    retokenized_measures,
)
from data.cli import InputError
from data.files import sha256_file
from data.segments import find_segments
from data.shards import open_corpus, read_shard, write_corpus_json, write_shard
from data.tokenizer import from_ranks, token_bytes, write_ranks

transformers = pytest.importorskip("transformers")

WORDS = """the cat sat on a mat, naïve café: 日本語 Ελλάδα 🙂 don't 3.14
  x = (y + 1)  # ok whereas measuring instruments disagree about curriculum learning; perplexity, entropy and surprise
return nothing unless somebody remembers yesterday's unreasonable experiments (again) für größere Wörterbücher""".split(
    " "
)
EXACT = dict(rtol=2e-4, atol=2e-5)


def some_documents(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(count)]


def trained_bpe(num_tokens: int, seed: int = 0):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=num_tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(some_documents(100, seed), trainer)
    return tokenizer


def renumbered(tokenizer, specials: list[str]):
    """The same BPE with special tokens in front: the same tokens under other ids."""
    from tokenizers import Tokenizer, models

    state = json.loads(tokenizer.to_str())
    vocab = {s: i for i, s in enumerate(specials)}
    vocab |= {word: i + len(specials) for word, i in state["model"]["vocab"].items()}
    other = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in state["model"]["merges"]]))
    other.pre_tokenizer, other.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
    other.add_special_tokens(specials)
    return other


@pytest.fixture(scope="module")
def bpe():
    return trained_bpe(320)


@pytest.fixture(scope="module")
def corpus(bpe, tmp_path_factory):
    """One shard of 20 documents in a BPE of 320 tokens; it begins and ends with whole documents."""
    from data.sample import byte_characters

    folder, alphabet = tmp_path_factory.mktemp("corpus"), byte_characters()
    by_id = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    write_ranks(folder / "bpe.tiktoken", [bytes(alphabet[c] for c in word) for word, _ in by_id])
    encoding = from_ranks(folder / "bpe.tiktoken")
    tokens = [t for text in some_documents(20, 1) for t in [320, *encoding.encode_ordinary(text)]]
    return write_corpus(folder, tokens, vocab_size=321)


def write_corpus(folder, tokens, vocab_size: int):
    [ranks] = folder.glob("*.tiktoken")
    write_shard(folder / "x_train_000000.bin", np.array(tokens, np.uint16))
    about = {"name": ranks.stem, "ranks": ranks.name, "sha256": sha256_file(ranks)}
    write_corpus_json(folder, tokenizer=about, vocab_size=vocab_size, bos_id=vocab_size - 1, source="a test")
    return open_corpus(folder)


def byte_corpus(folder, raw: bytes):
    """Tokens are bytes, so a segment may end inside any character; b"\\n" stands for BOS."""
    folder.mkdir()
    write_ranks(folder / "bytes.tiktoken", [bytes([b]) for b in range(256)])
    return write_corpus(folder, [256 if b == 10 else b for b in raw], vocab_size=257)


def save_model(folder, kind: str, vocab_size: int, window: int = 256):
    small = dict(vocab_size=vocab_size, tie_word_embeddings=kind != "llama")
    if kind == "llama":
        shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
        config = transformers.LlamaConfig(**small, **shape, max_position_embeddings=window)
    else:
        config = transformers.GPT2Config(**small, n_embd=32, n_layer=2, n_head=4, n_positions=window)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual 0.02 makes every prediction uniform
            parameter.mul_(5 if parameter.ndim == 2 else 1)
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder, tokenizer, **special):
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A Llama-like model with a larger BPE of its own that trims offsets, truncates, and puts BOS before every text."""
    from tokenizers import processors

    folder = tmp_path_factory.mktemp("other")
    tokenizer = renumbered(trained_bpe(400, seed=5), ["<s>", "</s>"])
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    tokenizer.enable_truncation(7)
    save_model(folder, "llama", 416)  # 402 ids, padded
    save_tokenizer(folder, tokenizer, bos_token="<s>", eos_token="</s>")
    return folder


def scored(reference, corpus, max_len: int, unit: str = "document", run: slice = slice(None), row_tokens: int = 512):
    """Columns of a run of a shard's segments, `length` and `num_bytes` among them."""
    tokens, pieces = read_shard(corpus.paths[0]), pieces_of(corpus)
    start_N, length_N = (x[run] for x in find_segments(tokens, corpus.bos_id, max_len, unit))
    num_bytes_N = np.array([len(text_of(tokens, pieces, a, n)) for a, n in zip(start_N, length_N, strict=True)])
    shard = (tokens, corpus.bos_id, pieces, start_N, length_N, num_bytes_N)
    told = []
    found = retokenized_measures(reference, *shard, row_tokens, told.append)
    assert sum(told) == length_N.sum() and min(told) >= 0
    return found | dict(length=length_N, num_bytes=num_bytes_N)


def scored_directly(reference, corpus, max_len: int, unit: str):
    tokens = np.asarray(read_shard(corpus.paths[0]))
    _, length_N = find_segments(tokens, corpus.bos_id, max_len, unit)
    bounds = np.concatenate([[0], np.cumsum(length_N)])
    size_V = np.array([len(p) for p in pieces_of(corpus)])
    num_bytes_N = np.add.reduceat(size_V[tokens[1:]], bounds[:-1])
    moments = reference.moments(tokens[:-1], tokens[1:], bounds)
    return model_measures(*(m.numpy() for m in moments), length_N, num_bytes_N)


def pieces_of(corpus):
    return token_bytes(from_ranks(next(corpus.folder.glob("*.tiktoken"))))


def text_of(tokens, pieces, start: int, length: int) -> bytes:
    return b"".join(pieces[t] for t in tokens[start + 1 : start + length + 1])


def total_nll(columns) -> float:
    return float(np.nansum(columns["nll"].astype(np.float64) * columns["num_reference_tokens"]))


# ---------------------------------------------------------------- the path is chosen, and both paths agree


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_same_tokenizer_under_other_ids_gives_the_same_scores(kind, bpe, corpus, tmp_path, capsys):
    """Ids are moved by one and so are the model's rows: every number must come out as on the direct path."""
    model = save_model(tmp_path / "direct", kind, 321)
    save_tokenizer(tmp_path / "direct", with_bos_last(bpe), bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    direct = open_reference(str(tmp_path / "direct"), corpus, 64, device="cpu")
    assert direct.retokenizer is None and "comparable" not in direct.about and capsys.readouterr().out == ""

    with torch.no_grad():
        for embedding in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            embedding.copy_(embedding.roll(1, 0))
    model.save_pretrained(tmp_path / "moved")
    moved = renumbered(bpe, ["<|endoftext|>"])
    save_tokenizer(tmp_path / "moved", moved, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    again = open_reference(str(tmp_path / "moved"), corpus, 64, device="cpu")
    assert "another tokenizer (321 ids) than the shards (321)" in capsys.readouterr().out
    assert again.about["comparable"] == "nll_per_byte" and len(again.about["tokenizer_sha256"]) == 64

    for unit in ("document", "window"):
        expected, found = scored_directly(direct, corpus, 64, unit), scored(again, corpus, 64, unit)
        # A token inside a character counts where the character begins: such segments differ by just these tokens.
        same = found["num_reference_tokens"] == found["length"]
        assert same.mean() > 0.6 and found["num_reference_tokens"].sum() == found["length"].sum()
        whole = np.flatnonzero(same & np.append(same[1:], True) & np.insert(same[:-1], 0, True))
        assert len(whole) > 10
        for name in MODEL_MEASURES:
            np.testing.assert_allclose(found[name][whole], expected[name][whole], err_msg=name, **EXACT)


def with_bos_last(tokenizer):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def test_another_bos_or_no_usable_tokenizer(bpe, corpus, tmp_path):
    """Equal ids of text with another BOS are read through the tokenizer; one that marks no documents is refused."""
    tokenizer = with_bos_last(bpe)
    tokenizer.add_special_tokens(["</s>"])
    save_model(tmp_path / "bos", "gpt2", 322)
    save_tokenizer(tmp_path / "bos", tokenizer, bos_token="</s>")
    found = open_reference(str(tmp_path / "bos"), corpus, 64, device="cpu").retokenizer
    assert (found.begin_id, found.end_id, found.always_begin) == (321, 321, False)

    save_model(tmp_path / "none", "gpt2", 900)
    save_tokenizer(tmp_path / "none", bpe)
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        open_reference(str(tmp_path / "none"), corpus, 64, device="cpu")
    (tmp_path / "none" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer cannot be loaded"):
        open_reference(str(tmp_path / "none"), corpus, 64, device="cpu")

    save_model(tmp_path / "empty", "gpt2", 900)  # GPT-2's class makes itself an empty tokenizer
    with pytest.raises(InputError, match="900 token ids.*321: it was trained on another vocabulary"):
        open_reference(str(tmp_path / "empty"), corpus, 64, device="cpu")


def test_a_slow_tokenizer_is_refused(corpus, tmp_path, monkeypatch):
    class Slow:
        is_fast = False

    save_model(tmp_path / "slow", "gpt2", 900)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Slow())
    with pytest.raises(InputError, match="a slow one, which cannot tell where"):
        open_reference(str(tmp_path / "slow"), corpus, 64, device="cpu")


# ---------------------------------------------------------------- nothing lost, nothing twice


@torch.inference_mode()
def test_whole_documents_cost_what_the_model_itself_says(corpus, other):
    """Documents within the window: [BOS] text [EOS], one by one through the model's own logits."""
    reference = open_reference(str(other), corpus, 512, device="cpu")
    assert (reference.vocab_size, reference.retokenizer.always_begin, reference.retokenizer.window) == (402, True, 256)
    model = transformers.AutoModelForCausalLM.from_pretrained(other).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    texts = some_documents(20, 1)
    found = scored(reference, corpus, 512)
    assert len(found["nll"]) == len(texts) and found["num_bytes"].sum() == sum(len(t.encode()) for t in texts)
    for i, text in enumerate(texts):
        ids = tokenizer(text, truncation=False, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        ids = [0, *ids] + [1] * (i < len(texts) - 1)  # what follows the shard's last document is not known
        logp = model(input_ids=torch.tensor([ids])).logits[0, :-1, :402].double().log_softmax(1)
        nll = -logp[torch.arange(len(ids) - 1), ids[1:]]
        assert found["num_reference_tokens"][i] == len(nll)
        np.testing.assert_allclose(found["nll"][i], nll.mean(), **EXACT)
        np.testing.assert_allclose(found["nll_per_byte"][i], nll.sum() / len(text.encode()), **EXACT)


@pytest.mark.parametrize("unit", ["document", "window"])
@pytest.mark.parametrize("max_len", [3, 40])
def test_sums_over_segments_are_sums_over_the_text_whatever_the_units(corpus, other, max_len, unit):
    reference = open_reference(str(other), corpus, max_len, device="cpu")
    whole = scored(reference, corpus, max_len, unit)
    ids = [reference.retokenizer.backend.encode(t, add_special_tokens=False).ids for t in some_documents(20, 1)]
    assert whole["num_reference_tokens"].sum() == sum(map(len, ids)) + len(ids) - 1
    counted = whole["num_bytes"] > 0
    np.testing.assert_allclose(
        total_nll({k: v[counted] for k, v in whole.items()}),
        np.nansum((whole["nll_per_byte"] * whole["num_bytes"])[counted].astype(np.float64)),
        rtol=1e-5,
    )
    assert (np.isnan(whole["nll"]) == (whole["num_reference_tokens"] == 0)).all()
    cuts = [0, 1, len(whole["nll"]) // 3, len(whole["nll"]) - 2, len(whole["nll"])]
    parts = [scored(reference, corpus, max_len, unit, slice(a, b), 200) for a, b in zip(cuts, cuts[1:], strict=False)]
    for name in whole:
        np.testing.assert_allclose(np.concatenate([p[name] for p in parts]), whole[name], err_msg=name, **EXACT)


def test_a_window_shorter_than_a_segment_cuts_it_again(corpus, other, tmp_path):
    """GPT-2-like, window 16: a segment's tokens in runs of 16, each seeing the token before it."""
    save_model(tmp_path, "gpt2", 402, window=16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path)
    reference = open_reference(str(tmp_path), corpus, 512, device="cpu")
    assert reference.retokenizer[1:5] == (0, 1, False, 16) and reference.about["window"] == 16
    found = scored(reference, corpus, 512)
    text = some_documents(20, 1)[2]
    ids = np.array([0, *reference.retokenizer.backend.encode(text, add_special_tokens=False).ids, 1])
    assert len(ids) > 40
    parts = [
        reference.moments(ids[at : at + 16][: len(ids) - 1 - at], ids[at + 1 : at + 17], np.array([0, n]))[0]
        for at in range(0, len(ids) - 1, 16)
        for n in [min(16, len(ids) - 1 - at)]
    ]
    np.testing.assert_allclose(found["nll"][2], torch.cat(parts).mean(), **EXACT)


def test_very_long_documents_are_encoded_in_parts(corpus, other, monkeypatch):
    monkeypatch.setattr(retokenize, "LONGEST_TEXT", 10)
    monkeypatch.setattr(retokenize, "BATCH_TOKENS", 30)
    tokens, pieces = read_shard(corpus.paths[0]), pieces_of(corpus)
    start = find_texts(tokens, corpus.bos_id, pieces)
    assert len(start) > 100
    text = [b"".join(pieces[t] for t in part) for part in np.split(tokens, start[1:])]
    assert "".join(t.decode() for t in text) == "".join(some_documents(20, 1))  # no part ends inside a character
    reference = open_reference(str(other), corpus, 17, device="cpu")
    encode = reference.retokenizer.backend.encode
    found = scored(reference, corpus, 17)
    expected = sum(len(encode(t.decode(), add_special_tokens=False).ids) for t in text) + 19
    assert found["num_reference_tokens"].sum() == expected
    again = scored(reference, corpus, 17, run=slice(30, 60))
    np.testing.assert_allclose(again["nll"], found["nll"][30:60], **EXACT)


# ---------------------------------------------------------------- characters and documents cut in two, bytes no text


def test_a_character_in_two_segments_belongs_to_the_first(other, tmp_path):
    """Segments of 3 bytes: "ab", é in two, the emoji in two, one of three bytes in one."""
    corpus = byte_corpus(tmp_path / "bytes", b"\n" + "abé🙂".encode())
    reference = open_reference(str(other), corpus, 3, device="cpu")
    found = scored(reference, corpus, 3)
    assert found["num_bytes"].tolist() == [3, 3, 2]
    encoding = reference.retokenizer.backend.encode("abé🙂", add_special_tokens=False)
    characters = [min(a, 3) for a, _ in encoding.offsets]
    expected = [sum(c < 3 for c in characters), sum(c == 3 for c in characters), 0]
    assert found["num_reference_tokens"].tolist() == expected
    assert np.isfinite(found["nll"][:2]).all()
    assert all(np.isnan(found[name][2]) for name in MODEL_MEASURES)
    assert found["num_unreadable_bytes"].sum() == 0


def test_a_token_begins_with_its_space_whatever_its_offsets_say(other, tmp_path):
    """Segments "ab " and "the": the token " the" belongs to the first, though its offsets leave out the space."""
    corpus = byte_corpus(tmp_path / "bytes", b"\nab the")
    reference = open_reference(str(other), corpus, 3, device="cpu")
    encoding = reference.retokenizer.backend.encode("ab the", add_special_tokens=False)
    assert (encoding.tokens[-1], encoding.offsets[-1]) == ("Ġthe", (3, 6))
    assert scored(reference, corpus, 3)["num_reference_tokens"].tolist() == [len(encoding), 0]


def test_cut_and_empty_documents_and_invalid_bytes_are_scored_and_counted(other, tmp_path):
    raw = "é".encode()[1:] + b"ab\n\n\n<s>x\xff\xfey" + "é".encode() + b"\n" + "日".encode()[:2]
    corpus = byte_corpus(tmp_path / "bytes", raw)
    reference = open_reference(str(other), corpus, 64, device="cpu")
    found = scored(reference, corpus, 64)
    # "ab", "", "", the text with two bytes that are no text, and two thirds of a character cut off by the shard's end.
    assert found["num_unreadable_bytes"].tolist() == [0, 0, 0, 2, 2]
    assert found["num_bytes"].tolist() == [2, 0, 0, 9, 2]
    text = "<s>x\ufffd\ufffdyé"  # the BOS written in the text is text
    encode = reference.retokenizer.backend.encode
    counts = [len(encode(t, add_special_tokens=False).ids) for t in ("ab", "", "", text, "")]
    assert found["num_reference_tokens"].tolist() == [counts[0] + 1, 1, 1, counts[3] + 1, 0]
    assert encode("<s>", add_special_tokens=False).ids != [0]
    finite = np.isfinite(found["nll"])
    assert finite.tolist() == [True, True, True, True, False]
    assert np.isnan(found["nll_per_byte"]).tolist() == [False, True, True, False, True]
    assert describe(found).endswith(
        "1 segments hold the begin of none and are NaN, 2 have no text; 4 bytes in 2 segments are not UTF-8"
    )
    for i in range(5):
        alone = scored(reference, corpus, 64, run=slice(i, i + 1))
        np.testing.assert_allclose(alone["nll"][0], found["nll"][i], **EXACT)


def test_a_shard_that_begins_inside_a_document_gives_its_first_token_as_context(bpe, corpus, other, tmp_path):
    """As on the direct path: the shard's first token is seen, not predicted."""
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "bpe.tiktoken").write_bytes((corpus.folder / "bpe.tiktoken").read_bytes())
    encoding = from_ranks(folder / "bpe.tiktoken")
    cut = write_corpus(folder, [*encoding.encode_ordinary("the cat sat"), 320], vocab_size=321)
    reference = open_reference(str(other), cut, 64, device="cpu")
    backend = reference.retokenizer.backend
    ids = backend.encode("the cat sat", add_special_tokens=False).ids
    found = scored(reference, cut, 64)
    assert found["num_reference_tokens"].tolist() == [len(ids)]  # all but the first, and the end of the document
    nll = reference.moments(np.array([0, *ids]), np.array([*ids, 1]), np.array([0, len(ids) + 1])).nll_N
    np.testing.assert_allclose(found["nll"][0], nll[1:].mean(), **EXACT)


def test_a_sentencepiece_like_tokenizer_with_byte_fallback(tmp_path):
    """Spaces as their own mark, one put before each text, unknown characters in bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "</s>", "<unk>"] + [f"<0x{b:02X}>" for b in range(256)] + list("▁abcdé") + ["▁a", "▁ab"]
    vocab = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁a", "b")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    save_model(tmp_path / "model", "llama", len(words))
    save_tokenizer(tmp_path / "model", tokenizer, bos_token="<s>", eos_token="</s>")
    text = "ab ab日é  a"
    corpus = byte_corpus(tmp_path / "bytes", b"\n" + text.encode() + b"\n")
    reference = open_reference(str(tmp_path / "model"), corpus, 7, device="cpu")
    found = scored(reference, corpus, 7)
    # |ab ab日(2 of 3)|日 é  a| end: 日 is three byte tokens where it begins
    assert reference.retokenizer.backend.encode(text).tokens == (
        ["▁ab", "▁ab", "<0xE6>", "<0x97>", "<0xA5>", "é", "▁", "▁a"]
    )
    assert found["num_bytes"].tolist() == [7, 6]
    assert found["num_reference_tokens"].tolist() == [5, 4]


@given(
    raw=st.lists(st.one_of(st.binary(max_size=3), st.sampled_from([b"\n", *(w.encode() for w in WORDS)])), min_size=2),
    max_len=st.integers(1, 9),
    unit=st.sampled_from(["document", "window"]),
    longest=st.integers(2, 50),
    window=st.integers(2, 9),
    share=st.floats(0, 1),
)
def test_any_shard_in_any_units_counts_every_token_once(other, raw, max_len, unit, longest, window, share):
    """A stand-in for a model whose NLL tells which token was predicted from which."""
    tokens = np.array([256 if b == 10 else b for b in b"\n".join(raw) + b"ab"], np.uint16)
    pieces = [bytes([b]) for b in range(256)] + [b""]
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    use = open_retokenizer("it", tokenizer, window, 402)

    def moments(input_ids, target_ids, bounds):
        assert np.diff(bounds).max() <= window and (input_ids[bounds[:-1]] == 0).sum() == len(bounds) - 1
        return [torch.tensor(1.0 + target_ids)] * 3

    reference = SimpleNamespace(retokenizer=use, moments=moments)
    start_N, length_N = find_segments(tokens, 256, max_len, unit)
    num_bytes_N = np.array([len(text_of(tokens, pieces, a, n)) for a, n in zip(start_N, length_N, strict=True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retokenize, "LONGEST_TEXT", longest)
        stream = reference_stream(use, tokens, 256, pieces, 0, len(tokens) - 1)
        cut = 1 + int(share * (len(start_N) - 1))
        parts = [
            retokenized_measures(reference, tokens, 256, pieces, start_N[run], length_N[run], num_bytes_N[run], 20)
            for run in (slice(0, cut), slice(cut, None), slice(None))
            if len(start_N[run])
        ]
    assert (np.diff(stream.place_R) >= 0).all() and stream.place_R[-1] < len(tokens)
    expected = (1.0 + stream.id_R[stream.scored_R & (stream.place_R > 0)]).sum()
    assert np.isclose(total_nll(parts[-1]), expected)
    assert parts[-1]["num_unreadable_bytes"].sum() == (stream.unreadable > 0).sum()
    for name, column in parts[-1].items():
        np.testing.assert_allclose(np.concatenate([p[name] for p in parts[:-1]]), column, rtol=1e-6, err_msg=name)


@given(
    raw=st.one_of(st.binary(max_size=30), st.text(max_size=12).map(str.encode)), cuts=st.tuples(*[st.booleans()] * 2)
)
def test_every_byte_is_readable_or_counted(raw, cuts):
    text, byte_C, bad = readable(raw, *cuts)
    assert len(byte_C) == len(text) + 1 and (np.diff(byte_C) > 0).all()
    assert len(set(bad.tolist())) == len(bad)
    for i, character in enumerate(text):
        held = raw[byte_C[i] : byte_C[i + 1]]
        assert held == character.encode() or (character == "\ufffd" and len(held) == 1 and byte_C[i] in bad)
    left_out = len(raw) - (byte_C[-1] - byte_C[0])
    assert left_out <= 3 * sum(cuts)
    if raw.decode(errors="ignore").encode() == raw and not any(cuts):
        assert text == raw.decode() and len(bad) == 0
