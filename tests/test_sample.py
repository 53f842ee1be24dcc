"""The embedded corpus: the same bytes every time, disjoint splits, and every token decodes to the text it came from."""

import sys

import numpy as np
import pytest

from data.cli import InputError
from data.sample import SHARE_OF_SPLIT, byte_characters, main, name_hash, split_of, stdlib_modules
from data.segments import corpus_segments
from data.shards import open_corpus, read_shard
from data.tokenizer import decode, of_corpus

TOKENS, VOCAB = 120_000, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "stdlib"
    main(out, TOKENS, VOCAB)
    return out


def texts(folder, split: str) -> list[str]:
    """The documents of a split, decoded."""
    corpus = open_corpus(folder, split)
    tokens = np.asarray(read_shard(corpus.paths[0]))
    encoding = of_corpus(corpus)
    return [decode(encoding, part).decode() for part in np.split(tokens, np.flatnonzero(tokens == corpus.bos_id))[1:]]


def test_the_same_command_gives_the_same_bytes(folder, tmp_path):
    main(tmp_path / "again", TOKENS, VOCAB)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_every_module_is_one_document_of_the_split_of_its_name(folder):
    modules, _ = stdlib_modules(int(TOKENS * 2.9))
    for split in SHARE_OF_SPLIT:
        assert texts(folder, split) == [text for name, text in modules.items() if split_of(name) == split]


def test_splits_share_no_text(folder):
    train, val, reference = (set(texts(folder, split)) for split in ("train", "val", "reference"))
    assert train and val and reference
    assert not (train & val or train & reference or val & reference)


def test_it_opens_as_a_corpus_that_says_what_it_is(folder):
    corpus = open_corpus(folder)
    assert (corpus.vocab_size, corpus.bos_id) == (VOCAB, VOCAB - 1)
    assert corpus.source == f"standard library of Python {sys.version.split()[0]}"
    assert corpus_segments(corpus, 1024).num_tokens == len(read_shard(corpus.paths[0])) - 1  # ids inside the vocabulary


def test_names_are_dealt_by_the_shares_promised():
    names = [f"package{i}.module{j}" for i in range(40) for j in range(250)]
    dealt = np.array([split_of(name) for name in names])
    for split, share in SHARE_OF_SPLIT.items():
        four_sd = 4 * np.sqrt(share * (1 - share) / len(names))
        assert abs(np.mean(dealt == split) - share) < four_sd


def test_a_smaller_sample_is_the_beginning_of_a_larger_one():
    small, large = (list(stdlib_modules(size)[0].items()) for size in (100_000, 300_000))
    assert 0 < len(small) < len(large) and large[: len(small)] == small
    assert sum(len(text) for _, text in small[:-1]) < 100_000 <= sum(len(text) for _, text in small)


def test_what_is_read_of_a_library(tmp_path, monkeypatch):
    """Blank modules, tests and what is not UTF-8 stay out; the last are counted. The order is that of a hash."""
    for name, content in {
        "b.py": b"b = 1\n",
        "a.py": b"a = 1\n",
        "pkg/c.py": "c = 'é'\n".encode(),
        "pkg/__init__.py": b" \n",
        "latin.py": "x = 'é'\n".encode("latin-1"),
        "test/d.py": b"d = 1\n",
        "pkg/tests/e.py": b"e = 1\n",
        "site-packages/f.py": b"f = 1\n",
        "notes.txt": b"g",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    modules, num_skipped = stdlib_modules(10**9)
    assert modules == {"a": "a = 1\n", "b": "b = 1\n", "pkg.c": "c = 'é'\n"} and num_skipped == 1
    assert list(modules) == sorted(modules, key=name_hash)


def test_a_python_without_its_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match="no readable Python source there"):
        main(tmp_path / "out", TOKENS, VOCAB)
    assert not any(tmp_path.iterdir())


def test_a_split_without_a_module_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "lonely.py").write_text("x = 1\n")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "library"))
    with pytest.raises(InputError, match="no module fell into the .* split: ask for more --tokens"):
        main(tmp_path / "out", 10_000, 257)
    assert [path.name for path in tmp_path.iterdir()] == ["library"]


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious").write_text("1")
    with pytest.raises(InputError, match="already there; remove it or choose another --out"):
        main(tmp_path, TOKENS, VOCAB)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "sentence"),
    [
        (9_999, VOCAB, "--tokens 9999: at least 10000 are needed"),
        (TOKENS, 256, "--vocab-size 256: expected 257 .* to 65536"),
        (TOKENS, 65_537, "--vocab-size 65537: expected 257 .* to 65536"),
        (10_000, 60_000, r"the text supports only \d+ BPE tokens, 59999 were asked for"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(tmp_path, tokens, vocab_size, sentence):
    with pytest.raises(InputError, match=sentence):
        main(tmp_path / "out", tokens, vocab_size)
    assert not any(tmp_path.iterdir())


def test_every_byte_has_its_character():
    from tokenizers.pre_tokenizers import ByteLevel

    characters = byte_characters()
    assert sorted(characters.values()) == list(range(256))
    assert set(characters) == set(ByteLevel.alphabet())
