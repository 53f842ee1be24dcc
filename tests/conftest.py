"""What the tests share: a corpus of a few thousand tokens, and hypothesis' settings.

`tiny_corpus` is a folder made once per session: read it, never write into it. A test that needs its own, or another
one, asks for `make_tiny_corpus`:

    folder = make_tiny_corpus(tmp_path / "corpus", train_tokens=2000, num_shards=3, seed=1)
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from data.files import sha256_file
from data.shards import write_corpus_json, write_shard
from data.tokenizer import write_ranks

# Derandomised: a failure on one machine is a failure on all of them.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")

BOS_ID = 256
LETTERS = np.frombuffer(b"etaoinshrdlu ETAOINSHRDLU\n.,;:-+*/=()[]{}", np.uint8)


def write_tiny_corpus(
    folder: Path,
    *,
    train_tokens: int = 6000,
    val_tokens: int = 1500,
    reference_tokens: int = 3000,
    num_shards: int = 2,
    seed: int = 0,
) -> Path:
    """Write shards, rank file and corpus.json into the new `folder`; returns it.

    Tokens are bytes (0..255) and BOS (256), vocabulary 257. Documents have 3 to 300 tokens, about 60 on average, so
    max_len = 64 cuts some and packs others. Each is a short phrase repeated, with a share of its own (0 to 1) of the
    letters replaced by random ones: its entropy is anything from nothing to that of noise, whatever its length.
    Splits are cut after exactly so many tokens, as FineWeb's are: the second training shard begins inside a document.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    ranks = folder / "tiny_bytes.tiktoken"
    write_ranks(ranks, [bytes([b]) for b in range(256)])
    train = np.array_split(documents(rng, train_tokens), num_shards)
    for number, tokens in enumerate(train):
        write_shard(folder / f"tiny_train_{number:06}.bin", tokens)
    write_shard(folder / "tiny_val_000000.bin", documents(rng, val_tokens))
    write_shard(folder / "tiny_reference_000000.bin", documents(rng, reference_tokens))
    write_corpus_json(
        folder,
        tokenizer={"name": ranks.stem, "ranks": ranks.name, "sha256": sha256_file(ranks)},
        vocab_size=257,
        bos_id=BOS_ID,
        source=f"tests/conftest.py, seed {seed}",
    )
    return folder


def documents(rng: np.random.Generator, num_tokens: int) -> np.ndarray:
    """Documents laid end to end and cut after `num_tokens`, uint16."""
    parts, held = [], 0
    while held < num_tokens:
        num_letters = int(np.clip(rng.lognormal(3.7, 0.9), 2, 299))
        phrase = rng.choice(LETTERS, size=rng.integers(2, 12))
        noisy = rng.random(num_letters) < rng.random()
        text = np.where(noisy, rng.choice(LETTERS, num_letters), np.resize(phrase, num_letters))
        parts.append(np.concatenate([[BOS_ID], text]))
        held += num_letters + 1
    return np.concatenate(parts)[:num_tokens].astype(np.uint16)


@pytest.fixture(scope="session")
def make_tiny_corpus():
    """The factory itself: see `write_tiny_corpus`."""
    return write_tiny_corpus


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory, make_tiny_corpus) -> Path:
    """A folder of two training shards (6,000 tokens), one validation (1,500) and one reference shard (3,000)."""
    return make_tiny_corpus(tmp_path_factory.mktemp("tiny") / "corpus")
