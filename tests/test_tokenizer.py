"""Rank files round-trip, anything else is refused, and no byte of a text is lost or made up."""

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cli import InputError
from data.files import sha256_file
from data.shards import open_corpus, write_corpus_json, write_shard
from data.tokenizer import BOS, by_name, byte_lengths, decode, from_ranks, of_corpus, token_bytes, write_ranks

MERGED = [b"th", b"the", b" the", "é".encode(), " é".encode()]
VOCABULARY = [bytes([b]) for b in range(256)] + MERGED


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    write_ranks(path, VOCABULARY)
    return path


@pytest.fixture(scope="module")
def encoding(ranks):
    return from_ranks(ranks)


def line(token: bytes, rank: int | str) -> str:
    return f"{base64.b64encode(token).decode()} {rank}\n"


def test_a_rank_file_reads_back_as_written(encoding):
    assert token_bytes(encoding) == (*VOCABULARY, b"")  # BOS is the id after the last rank, and no text
    assert (encoding.n_vocab, encoding.eot_token, encoding.name) == (262, 261, "small")
    assert byte_lengths(encoding).tolist() == [len(token) for token in VOCABULARY] + [0]


@given(text=st.one_of(st.text(max_size=40), st.text(" \nthé<|>", max_size=40)))
def test_every_text_round_trips_and_its_bytes_are_counted(encoding, text):
    ids = np.array([encoding.eot_token, *encoding.encode_ordinary(text)], np.uint16)
    assert decode(encoding, ids) == text.encode()
    assert byte_lengths(encoding)[ids].sum() == len(text.encode())


def test_merges_are_used(encoding):
    assert [token_bytes(encoding)[i] for i in encoding.encode_ordinary("the thé")] == [
        b"the",
        b" ",
        b"th",
        "é".encode(),
    ]


def test_bos_leaves_no_trace_in_the_text_and_cannot_be_written_in_it(encoding):
    bos = encoding.eot_token
    assert decode(encoding, np.array([bos, 104, 105, bos, bos, 33, bos], np.uint16)) == b"hi!"
    assert decode(encoding, np.array([], np.uint16)) == b""
    assert bos not in encoding.encode_ordinary(f"a{BOS}b")


def test_a_piece_may_end_inside_a_character(encoding):
    snow = "☃".encode()
    assert decode(encoding, np.array(list(snow[:2]), np.uint16)) == snow[:2]


SINGLE = "".join(line(bytes([b]), b) for b in range(256))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (SINGLE + "dGg=\n", "line 257 is not `base64 rank`"),
        (SINGLE + "dGg= 256 0\n", "line 257 is not `base64 rank`"),
        (SINGLE + "dG%g= 256\n", "line 257 is not `base64 rank`"),
        (SINGLE + line(b"th", "many"), "line 257 is not `base64 rank`"),
        ("", "256 of the 256 single bytes have no rank"),
        (SINGLE.replace(line(b"a", 97), ""), "1 of the 256 single bytes have no rank"),
        (SINGLE + line(b"th", 257), r"ranks must be 0\.\.256 once each"),
        (SINGLE + line(b"th", 255), r"ranks must be 0\.\.256 once each"),
        (SINGLE + line(b"a", 256), r"ranks must be 0\.\.255 once each"),  # a byte twice: its first rank is lost
        (SINGLE + line(b"th", -1), r"ranks must be 0\.\.256 once each"),
    ],
)
def test_a_malformed_rank_file_is_refused(tmp_path, text, sentence):
    path = tmp_path / "bad.tiktoken"
    path.write_text(text)
    with pytest.raises(InputError, match=sentence) as refusal:
        from_ranks(path)
    assert str(path) in str(refusal.value)


def test_a_missing_rank_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such rank file"):
        from_ranks(tmp_path / "none.tiktoken")


# -- The tokenizer of a corpus


def corpus_with(folder, tokenizer: dict):
    write_shard(folder / "x_train_000000.bin", np.array([256, 1, 2]))
    write_corpus_json(folder, tokenizer=tokenizer, vocab_size=257, bos_id=256, source="")
    return open_corpus(folder)


def test_a_corpus_names_the_encoding_that_made_it(ranks, encoding):
    found, about = by_name(str(ranks))
    assert about == {"name": "small", "ranks": "small.tiktoken", "sha256": sha256_file(ranks)}
    for other in (found, of_corpus(corpus_with(ranks.parent, about))):
        assert token_bytes(other) == token_bytes(encoding)


def test_a_changed_rank_file_is_refused_even_if_it_is_whole(make_tiny_corpus, tmp_path):
    folder = make_tiny_corpus(tmp_path / "corpus")
    corpus = open_corpus(folder)
    assert of_corpus(corpus).n_vocab == 257
    write_ranks(folder / "tiny_bytes.tiktoken", [bytes([255 - b]) for b in range(256)])
    with pytest.raises(InputError, match=r"tiny_bytes\.tiktoken: sha256 \w{12}, but corpus\.json says \w{12}"):
        of_corpus(corpus)


def test_a_rank_file_that_is_gone_is_refused(make_tiny_corpus, tmp_path):
    folder = make_tiny_corpus(tmp_path / "corpus")
    (folder / "tiny_bytes.tiktoken").unlink()
    with pytest.raises(InputError, match="tiny_bytes.tiktoken: no such rank file"):
        of_corpus(open_corpus(folder))


def test_an_unknown_tokenizer_without_a_rank_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown tokenizer 'llama' without a rank file"):
        of_corpus(corpus_with(tmp_path, {"name": "llama"}))


def test_a_rank_file_recorded_without_its_hash_is_refused(ranks):
    with pytest.raises(InputError, match="sha256"):
        of_corpus(corpus_with(ranks.parent, {"name": "small", "ranks": ranks.name}))


def test_without_a_network_gpt2_is_a_sentence(monkeypatch):
    def get_encoding(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("tiktoken.get_encoding", get_encoding)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/nowhere")
    with pytest.raises(InputError, match=r"ConnectionError.*TIKTOKEN_CACHE_DIR .*now /nowhere"):
        by_name("gpt2")
