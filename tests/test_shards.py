"""Shards round-trip, anything else is refused with its sentence, and no write leaves half a file."""

import hashlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cli import InputError
from data.files import atomic_folder, atomic_path, read_json, write_json
from data.shards import HEADER_BYTES, check_vocab, open_corpus, read_shard, write_corpus_json, write_shard

# -- One shard


@given(ids=st.lists(st.integers(0, 65535), min_size=1, max_size=50), dtype=st.sampled_from(["<u2", ">u2", "i8", "u4"]))
def test_a_shard_reads_back_as_written_and_is_laid_out_as_llm_c_does(tmp_path_factory, ids, dtype):
    path = tmp_path_factory.mktemp("shard") / "x_train_000000.bin"
    write_shard(path, np.array(ids, dtype))
    assert read_shard(path).tolist() == ids
    assert read_shard(path).dtype == np.uint16
    raw = path.read_bytes()
    assert struct.unpack("<256i", raw[:1024]) == (20240520, 1, len(ids), *[0] * 253)
    assert struct.unpack(f"<{len(ids)}H", raw[1024:]) == tuple(ids)


def header(magic=20240520, version=1, num_tokens=3) -> bytes:
    return struct.pack("<256i", magic, version, num_tokens, *[0] * 253)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "0 bytes is shorter than a shard's 1024-byte header"),
        (header()[:-1], "1023 bytes is shorter than a shard's 1024-byte header"),
        (header(magic=20240801) + b"abcdef", "magic number 20240801, expected 20240520"),
        (header(version=2) + b"abcdef", "format version 2, expected 1"),
        (header() + b"abcd", "promises 3 tokens, the file holds 2: it is truncated"),
        (header() + b"abcde", "promises 3 tokens, the file holds 2.5: it is truncated"),
        (header(), "promises 3 tokens, the file holds 0: it is truncated"),
        (header() + b"abcdefgh", "promises 3 tokens, the file holds 4: it is longer than it says"),
        (header(num_tokens=-1) + b"ab", "promises -1 tokens, the file holds 1"),
        (header(num_tokens=0), "the shard is empty: 0 tokens"),
    ],
)
def test_a_file_that_is_no_whole_shard_is_refused(tmp_path, content, sentence):
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(content)
    for read in (read_shard, open_corpus):
        with pytest.raises(InputError, match=sentence) as refusal:
            read(path)
        assert str(path) in str(refusal.value)


def test_a_missing_shard_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "nothing.bin", tmp_path):
        with pytest.raises(InputError, match="no such shard"):
            read_shard(path)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (np.array([], np.int64), r"at least 1 token, got an array of shape \(0,\)"),
        (np.zeros((2, 2), np.int64), r"shape \(2, 2\)"),
        (np.array([5, -1]), r"fit uint16, got -1\.\.5"),
        (np.array([5, 65536]), r"fit uint16, got 5\.\.65536"),
    ],
)
def test_what_does_not_fit_a_shard_is_not_written(tmp_path, tokens, sentence):
    with pytest.raises(InputError, match=sentence):
        write_shard(tmp_path / "x.bin", tokens)
    assert not any(tmp_path.iterdir())


def test_fractions_are_no_token_ids(tmp_path):
    with pytest.raises(InputError):
        write_shard(tmp_path / "x.bin", np.array([1.7, 2.0]))


def test_the_largest_id_must_lie_inside_the_vocabulary():
    tokens = np.array([0, 256, 3], np.uint16)
    check_vocab("x.bin", tokens, 257)
    with pytest.raises(InputError, match=r"x\.bin: token id 256, but the vocabulary has 256 ids \(0\.\.255\)"):
        check_vocab("x.bin", tokens, 256)


# -- A corpus


def test_a_folder_means_the_shards_of_its_split_in_order(tiny_corpus):
    def names(where, split="train"):
        return [path.name for path in open_corpus(where, split).paths]

    assert names(tiny_corpus) == ["tiny_train_000000.bin", "tiny_train_000001.bin"]
    assert names(tiny_corpus, "val") == ["tiny_val_000000.bin"]
    assert names(tiny_corpus / "tiny_reference_000000.bin") == ["tiny_reference_000000.bin"]
    assert names(f"{tiny_corpus}/*_train_*1.bin") == ["tiny_train_000001.bin"]
    assert names(f"{tiny_corpus}/*.bin") == sorted(p.name for p in tiny_corpus.glob("*.bin"))


def test_nothing_found_says_what_is_there(tiny_corpus, tmp_path):
    with pytest.raises(InputError, match=r"no shard named \*_test_\*\.bin there; it holds tiny_reference_000000\.bin"):
        open_corpus(tiny_corpus, "test")
    with pytest.raises(InputError, match="no .bin file at all"):
        open_corpus(tmp_path)
    for where in (tmp_path / "gone", tmp_path / "gone.bin", f"{tmp_path}/*.bin"):
        with pytest.raises(InputError, match="no such shard or folder of shards"):
            open_corpus(where)


def test_shards_of_two_folders_are_no_corpus(tmp_path):
    for folder in ("a", "b"):
        write_shard(tmp_path / folder / "x_train_000000.bin", np.array([1]))
    with pytest.raises(InputError, match="must lie in one folder, got 2 folders"):
        open_corpus(f"{tmp_path}/*/*.bin")


def test_one_broken_shard_spoils_the_corpus_before_it_is_used(make_tiny_corpus, tmp_path):
    folder = make_tiny_corpus(tmp_path / "corpus")
    broken = folder / "tiny_train_000001.bin"
    broken.write_bytes(broken.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"tiny_train_000001\.bin: .*truncated"):
        open_corpus(folder)


def test_a_path_with_brackets_is_a_path(tmp_path):
    path = tmp_path / "run[1]" / "x_train_000000.bin"
    write_shard(path, np.array([1]))
    assert open_corpus(path).paths == (path,)


def test_shards_without_a_description_are_read_as_gpt2_and_that_is_printed(tmp_path, capsys):
    path = tmp_path / "fineweb_train_000001.bin"
    write_shard(path, np.array([50256, 11, 12]))
    corpus = open_corpus(tmp_path)
    assert (corpus.tokenizer, corpus.vocab_size, corpus.bos_id) == ({"name": "gpt2"}, 50257, 50256)
    assert f"{tmp_path}: no corpus.json; reading the shards as GPT-2 tokens" in capsys.readouterr().err
    assert corpus.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    open_corpus(tmp_path, quiet=True)
    assert capsys.readouterr().err == ""


def test_the_description_carries_over(tiny_corpus, capsys):
    corpus = open_corpus(tiny_corpus)
    about = read_json(tiny_corpus / "corpus.json")
    assert (corpus.vocab_size, corpus.bos_id, corpus.source) == (257, 256, about["source"])
    assert corpus.folder == tiny_corpus
    assert capsys.readouterr().err == ""
    for path in tiny_corpus.glob("*.bin"):
        assert about["shards"][path.name]["tokens"] == (path.stat().st_size - HEADER_BYTES) // 2
        assert about["shards"][path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(corpus.known_sha256) == {path.name for path in corpus.paths}  # not those of other splits


def test_a_shard_that_was_added_later_is_hashed(make_tiny_corpus, tmp_path):
    folder = make_tiny_corpus(tmp_path / "corpus")
    added = folder / "tiny_train_000002.bin"
    write_shard(added, np.array([256, 1, 2]))
    assert open_corpus(folder).sha256(added) == hashlib.sha256(added.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer": None}, "tokenizer must be a dict, got null"),
        ({"vocab_size": "257"}, 'vocab_size must be a int, got "257"'),
        ({"bos_id": 256.0}, r"bos_id must be a int, got 256\.0"),
        ({"source": 3}, "source must be a str, got 3"),
        ({"shards": []}, r"shards must be a dict, got \[\]"),
        ({"bos_id": 257}, "bos_id 257 lies outside the vocabulary of 257 ids"),
        ({"bos_id": -1}, "bos_id -1 lies outside the vocabulary of 257 ids"),
    ],
)
def test_a_malformed_description_is_refused(make_tiny_corpus, tmp_path, change, sentence):
    folder = make_tiny_corpus(tmp_path / "corpus")
    about = read_json(folder / "corpus.json")
    (folder / "corpus.json").write_text(json.dumps(about | change))
    with pytest.raises(InputError, match=sentence) as refusal:
        open_corpus(folder)
    assert "corpus.json" in str(refusal.value)


@pytest.mark.parametrize("key", ["tokenizer", "vocab_size", "bos_id", "source", "shards"])
def test_an_incomplete_description_is_refused(make_tiny_corpus, tmp_path, key):
    folder = make_tiny_corpus(tmp_path / "corpus")
    about = read_json(folder / "corpus.json")
    del about[key]
    (folder / "corpus.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=f"{key} must be a .*, got null"):
        open_corpus(folder)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "something unreadable"), ("[1, 2]", "expected a JSON object, got a list"), ("\xff", "something unreadable")],
)
def test_a_description_that_is_no_json_object_is_refused(make_tiny_corpus, tmp_path, text, sentence):
    folder = make_tiny_corpus(tmp_path / "corpus")
    (folder / "corpus.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=sentence):
        open_corpus(folder)


@pytest.mark.parametrize("entry", [{}, 5])
def test_a_shard_described_without_its_hash_is_refused(make_tiny_corpus, tmp_path, entry):
    folder = make_tiny_corpus(tmp_path / "corpus")
    about = read_json(folder / "corpus.json")
    about["shards"]["tiny_train_000000.bin"] = entry
    (folder / "corpus.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="tiny_train_000000"):
        open_corpus(folder)


def test_a_shard_made_again_after_its_description_is_refused(make_tiny_corpus, tmp_path):
    """Otherwise everything made from it carries the hash of a shard that is no more."""
    folder = make_tiny_corpus(tmp_path / "corpus")
    write_shard(folder / "tiny_train_000000.bin", np.array([256, 1, 2]))
    with pytest.raises(InputError, match="tiny_train_000000"):
        open_corpus(folder)


# -- Whole files or none


def held(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", [None, "old"])
def test_a_writer_that_raises_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "file.txt"
    if before:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert held(tmp_path) == ([path.name] if before else [])
    assert not before or path.read_text() == before


def test_a_writer_that_finishes_replaces_what_was_there(tmp_path):
    path = tmp_path / "made" / "file.txt"
    for text in ("old", "new"):
        with atomic_path(path) as temporary:
            temporary.write_text(text)
            assert temporary != path
        assert path.read_text() == text
    assert held(path.parent) == [path.name]


def test_a_folder_comes_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as folder:
        (folder / "first").write_text("1")
        raise RuntimeError
    assert held(tmp_path) == []
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "first").write_text("1")
        assert not (tmp_path / "out").exists()
    assert held(tmp_path) == ["out"] and held(tmp_path / "out") == ["first"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    with pytest.raises(OSError), atomic_folder(tmp_path / "out") as folder:
        (folder / "first").write_text("1")
    assert held(tmp_path) == ["out"] and held(tmp_path / "out") == ["precious"]


def test_what_is_not_json_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert held(tmp_path) == []


def test_the_leftover_of_a_killed_writer_is_no_shard(make_tiny_corpus, tmp_path):
    folder = make_tiny_corpus(tmp_path / "corpus")
    before, about = open_corpus(folder), read_json(folder / "corpus.json")
    with pytest.raises(OSError), atomic_path(folder / "tiny_train_000009.bin") as temporary:
        raise OSError
    temporary.write_bytes(b"half")  # what `kill -9` would have left behind
    assert open_corpus(folder) == before
    described = {key: about[key] for key in ("tokenizer", "vocab_size", "bos_id", "source")}
    assert write_corpus_json(folder, **described) == about
