"""Tokenizers: GPT-2's vocabulary, or any byte-level BPE saved as a rank file, both through `tiktoken`.

A rank file is tiktoken's own text format: one `base64(token bytes) rank` a line. The BOS token
`<|endoftext|>` is the id after the last rank. Both kinds split text with GPT-2's pattern.
"""

import base64
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.cli import InputError
from data.files import sha256_file, write_text
from data.shards import Corpus

BOS = "<|endoftext|>"


def gpt2():
    """GPT-2's encoding (50,257 ids, BOS 50256). tiktoken downloads it once; TIKTOKEN_CACHE_DIR holds it."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets whatever its HTTP library raises through
        raise InputError(
            "GPT-2's vocabulary could not be had: tiktoken must download it once "
            f"({type(error).__name__}); with no network set TIKTOKEN_CACHE_DIR to a folder that holds it "
            f"(now {os.environ.get('TIKTOKEN_CACHE_DIR', 'not set')})"
        ) from None


def from_ranks(path: Path | str):
    """A `tiktoken.Encoding` from a rank file. Raises InputError if it is missing, malformed or has gaps."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    path = Path(path)
    ranks: dict[bytes, int] = {}
    if not path.is_file():
        raise InputError(f"{path}: no such rank file")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise InputError(f"{path}: line {number} is not `base64 rank`: {line[:40]!r}") from None
    missing = 256 - sum(bytes([b]) in ranks for b in range(256))
    if missing:
        raise InputError(f"{path}: {missing} of the 256 single bytes have no rank: not every text could be encoded")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: ranks must be 0..{len(ranks) - 1} once each")
    return tiktoken.Encoding(path.stem, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={BOS: len(ranks)})


def write_ranks(path: Path | str, tokens: list[bytes]) -> None:
    """Save a vocabulary (token bytes by rank) as a rank file."""
    write_text(path, "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))


def by_name(name: str):
    """`gpt2` or the path of a rank file -> (encoding, description for `corpus.json`)."""
    if name == "gpt2":
        return gpt2(), {"name": "gpt2"}
    return from_ranks(name), {"name": Path(name).stem, "ranks": Path(name).name, "sha256": sha256_file(name)}


def of_corpus(corpus: Corpus):
    """The encoding that made a corpus. Raises InputError if its rank file is gone or was changed."""
    about = corpus.tokenizer
    if "ranks" not in about:
        if about.get("name") != "gpt2":
            raise InputError(
                f"{corpus.folder}/corpus.json: unknown tokenizer {about.get('name')!r} without a rank file"
            )
        return gpt2()
    path = corpus.folder / about["ranks"]
    encoding = from_ranks(path)
    if (found := sha256_file(path)) != (recorded := str(about.get("sha256"))):
        raise InputError(f"{path}: sha256 {found[:12]}, but corpus.json says {recorded[:12]}: the file was changed")
    return encoding


@lru_cache(maxsize=4)
def token_bytes(encoding) -> tuple[bytes, ...]:
    """The bytes of every id, (vocab_size,). BOS is no text: zero bytes."""
    bos_id = encoding.eot_token
    return tuple(b"" if i == bos_id else encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab))


@lru_cache(maxsize=4)
def byte_lengths(encoding) -> np.ndarray:
    """Bytes of every id, (vocab_size,) int32, so that `byte_lengths(e)[tokens].sum()` counts a text's bytes."""
    return np.array([len(b) for b in token_bytes(encoding)], dtype=np.int32)


def decode(encoding, tokens: np.ndarray) -> bytes:
    """The text of `tokens` as bytes, BOS left out (a segment may begin or end inside a character)."""
    pieces = token_bytes(encoding)
    return b"".join(pieces[t] for t in tokens.tolist())
