"""Token shards on disk: the `.bin` format of llm.c and modded-nanogpt, and the `corpus.json` beside them.

    header   256 int32: [20240520, 1, num_tokens, 0, 0, ...]
    body     num_tokens uint16 token ids; each document starts with the BOS token

`corpus.json` says what the ids mean: tokenizer, vocabulary size, BOS id, source, and each shard's SHA-256.
Stock FineWeb shards carry none; they are read as GPT-2, and that is printed.

    corpus = open_corpus("data/fineweb10B", split="train")      # or a file, or a glob
    tokens = read_shard(corpus.paths[0])                        # uint16 memmap, (num_tokens,)
"""

import glob
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cli import InputError
from data.files import atomic_path, read_json, sha256_file, write_json

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
CORPUS_VERSION = 1
GPT2 = {"tokenizer": {"name": "gpt2"}, "vocab_size": 50257, "bos_id": 50256}


@dataclass(frozen=True)
class Corpus:
    """Shards that belong together, in the order of their names, and what their token ids mean."""

    paths: tuple[Path, ...]
    tokenizer: dict  # {"name": "gpt2"} or {"name", "ranks": file beside corpus.json, "sha256"}
    vocab_size: int
    bos_id: int
    source: str
    known_sha256: dict[str, str]  # shard file name -> hash recorded when it was made; {} for stock shards

    @property
    def folder(self) -> Path:
        return self.paths[0].parent

    def sha256(self, path: Path) -> str:
        """The recorded hash of a shard, or its content's hash where none was recorded."""
        return self.known_sha256.get(path.name) or sha256_file(path)


def write_shard(path: Path | str, tokens: np.ndarray) -> None:
    """Write (num_tokens,) token ids as one shard, atomically.

    Raises InputError if there is no token or an id does not fit uint16.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0:
        raise InputError(f"{path}: a shard needs at least 1 token, got an array of shape {tokens.shape}")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"{path}: token ids must be whole numbers, got {tokens.dtype}")
    if tokens.dtype != np.uint16:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high > 65535:
            raise InputError(f"{path}: token ids must lie in 0..65535 to fit uint16, got {low}..{high}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").data)


def read_shard(path: Path | str) -> np.ndarray:
    """The tokens of a shard, memory-mapped: uint16, (num_tokens,).

    Raises InputError naming the file and the two numbers that disagree: size, magic, version or length.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such shard; expected a .bin file of tokens")
    num_bytes = path.stat().st_size
    if num_bytes < HEADER_BYTES:
        raise InputError(f"{path}: {num_bytes} bytes is shorter than a shard's {HEADER_BYTES}-byte header")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    magic, version, num_tokens = (int(x) for x in header[:3])
    if magic != MAGIC:
        raise InputError(f"{path}: magic number {magic}, expected {MAGIC}: this is not a token shard")
    if version != VERSION:
        raise InputError(f"{path}: shard format version {version}, expected {VERSION}")
    held_tokens = (num_bytes - HEADER_BYTES) / 2
    if num_tokens != held_tokens:
        state = "truncated" if held_tokens < num_tokens else "longer than it says"
        raise InputError(
            f"{path}: header promises {num_tokens} tokens, the file holds {held_tokens:g}: it is {state}; "
            "make or download it again"
        )
    if num_tokens < 1:
        raise InputError(f"{path}: the shard is empty: 0 tokens, expected at least 1")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def fingerprint(path: Path) -> str:
    """12 hex digits of a shard's size and of 64 blocks spread over it: tells shards apart without reading 200 MB.

    A guard against mixing things up, not against forgery; provenance carries the full SHA-256.
    """
    size, block = path.stat().st_size, 4096
    sha = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for at in np.linspace(0, max(0, size - block), 64).astype(int).tolist():
            file.seek(at)
            sha.update(file.read(block))
    return sha.hexdigest()[:12]


def check_vocab(path: Path | str, tokens: np.ndarray, vocab_size: int) -> None:
    """Raise InputError if a token id lies outside the vocabulary (reads every token, about 5 GB/s)."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise InputError(
            f"{path}: token id {largest}, but the vocabulary has {vocab_size} ids (0..{vocab_size - 1}): "
            "the shard was made with another tokenizer"
        )


def open_corpus(where: Path | str, split: str = "train", *, quiet: bool = False) -> Corpus:
    """Find shards and what their ids mean.

    `where` is a folder (then its `*_{split}_*.bin` are meant), one `.bin` file, or a glob.
    Every header is checked. Raises InputError if nothing is found or a shard is not whole.
    """
    where = str(where)
    if Path(where).is_dir():
        paths = sorted(Path(where).glob(f"*_{split}_*.bin"))
        if not paths:
            held = sorted(p.name for p in Path(where).glob("*.bin"))[:4]
            raise InputError(
                f"{where}: no shard named *_{split}_*.bin there; it holds "
                f"{', '.join(held) if held else 'no .bin file at all'}"
            )
    else:
        paths = [Path(where)] if Path(where).is_file() else sorted(Path(p) for p in glob.glob(where))
        if not paths:
            raise InputError(f"{where}: no such shard or folder of shards; make one with data.sample or data.prepare")
    if len(folders := {p.parent for p in paths}) > 1:
        raise InputError(f"{where}: shards of one corpus must lie in one folder, got {len(folders)} folders")
    names = [p.name for p in paths]
    lengths = {path.name: len(read_shard(path)) for path in paths}
    described = paths[0].parent / "corpus.json"
    if described.exists():
        about = read_corpus_json(described)
        known = {n: s["sha256"] for n, s in about["shards"].items() if n in names}
        for name in known:
            if lengths[name] != (recorded := about["shards"][name]["tokens"]):
                raise InputError(
                    f"{described}: {name} was recorded with {recorded} tokens and holds {lengths[name]}: it was made "
                    "again since; make the corpus again"
                )
    else:
        about, known = {**GPT2, "source": "no corpus.json: stock shards"}, {}
        if not quiet:
            print(f"{paths[0].parent}: no corpus.json; reading the shards as GPT-2 tokens (BOS 50256)", file=sys.stderr)
    return Corpus(tuple(paths), about["tokenizer"], about["vocab_size"], about["bos_id"], about["source"], known)


def read_corpus_json(path: Path) -> dict:
    """`corpus.json`, checked for the keys we rely on (InputError if one is missing or has another type)."""
    about = read_json(path)
    expected = {"tokenizer": dict, "vocab_size": int, "bos_id": int, "source": str, "shards": dict}
    for key, kind in expected.items():
        if not isinstance(about.get(key), kind) or isinstance(about[key], bool):
            raise InputError(f"{path}: {key} must be a {kind.__name__}, got {json.dumps(about.get(key))}")
    for name, shard in about["shards"].items():
        if not isinstance(shard, dict) or not {"tokens", "sha256"} <= shard.keys():
            raise InputError(f"{path}: shards.{name} must hold tokens and sha256, got {json.dumps(shard)}")
    if about["vocab_size"] > 65_536:
        raise InputError(
            f"{path}: vocab_size {about['vocab_size']}, but a shard's uint16 tokens hold at most 65536 ids"
        )
    if not 0 <= about["bos_id"] < about["vocab_size"]:
        raise InputError(f"{path}: bos_id {about['bos_id']} lies outside the vocabulary of {about['vocab_size']} ids")
    return about


def write_corpus_json(folder: Path, *, tokenizer: dict, vocab_size: int, bos_id: int, source: str) -> dict:
    """Describe every `.bin` of `folder` in `corpus.json`: length and SHA-256 of each. Returns what was written."""
    shards = {
        path.name: {"tokens": len(read_shard(path)), "sha256": sha256_file(path)}
        for path in sorted(folder.glob("*.bin"))
    }
    about = dict(
        version=CORPUS_VERSION, tokenizer=tokenizer, vocab_size=vocab_size, bos_id=bos_id, source=source, shards=shards
    )
    write_json(folder / "corpus.json", about)
    return about
