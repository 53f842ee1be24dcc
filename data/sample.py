"""The embedded corpus: the source of the Python standard library that is running.

Real text that nobody here wrote (prose, code, tables), present wherever this program can run, so the whole
path can be tried with no network. Each module is a document. A byte-level BPE is trained on it on the spot.
Modules are dealt by a hash of their name: 10 % validation, 30 % reference (the text the reference model
learns from, so that it never scores what it has seen), 60 % train.

    python -m data.sample --out data/stdlib --tokens 2000000
"""

import hashlib
import sys
import sysconfig
from pathlib import Path

import numpy as np

from data.cli import InputError, command
from data.files import atomic_folder, digest, sha256_file
from data.shards import write_corpus_json, write_shard
from data.tokenizer import from_ranks, write_ranks

# Tests are left out: some distributions ship Python without them, and the corpus should not depend on that.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SHARE_OF_SPLIT = {"val": 0.1, "reference": 0.3, "train": 0.6}
CHARACTERS_A_TOKEN = 2.9  # measured with 2,048 ids on Python 3.11: only used to bound what is read


def main(out: Path = Path("data/stdlib"), tokens: int = 2_000_000, vocab_size: int = 2048) -> None:
    """Write the standard library of this Python as token shards: reference, train and validation.

    Args:
        out: folder for the shards, the tokenizer and corpus.json.
        tokens: stop adding modules once about this many tokens are reached, all splits together.
        vocab_size: ids of the byte-level BPE trained on the spot, the BOS token included (257 to 65536).
    """
    if tokens < 10_000:
        raise InputError(f"--tokens {tokens}: at least 10000 are needed to fill three splits")
    if not 257 <= vocab_size <= 65_536:
        raise InputError(f"--vocab-size {vocab_size}: expected 257 (bytes and BOS) to 65536 (uint16)")
    if out.exists():
        raise InputError(f"{out}: already there; remove it or choose another --out")
    modules, num_skipped = stdlib_modules(int(tokens * CHARACTERS_A_TOKEN))
    num_characters = sum(map(len, modules.values()))
    print(
        f"{len(modules)} modules, {num_characters / 1e6:.1f} MB of Python {sys.version.split()[0]}; "
        f"{num_skipped} not in UTF-8 passed over"
    )
    with atomic_folder(out) as folder:
        about = write_splits(folder, modules, vocab_size)
    print(f"corpus {digest(about['shards'])} in {out}")


def write_splits(folder: Path, modules: dict[str, str], vocab_size: int) -> dict:
    """Train the tokenizer, deal the modules into splits, write one shard each. Returns `corpus.json`."""
    ranks = folder / f"stdlib_bpe_{vocab_size}.tiktoken"
    write_ranks(ranks, train_bpe(list(modules.values()), vocab_size - 1))
    encoding = from_ranks(ranks)
    documents: dict[str, list[np.ndarray]] = {split: [] for split in SHARE_OF_SPLIT}
    for name, text in modules.items():
        documents[split_of(name)].append(np.array([encoding.eot_token, *encoding.encode_ordinary(text)], np.uint16))
    for split, parts in documents.items():
        if not parts:
            raise InputError(f"no module fell into the {split} split: ask for more --tokens")
        joined = np.concatenate(parts)
        write_shard(folder / f"stdlib_{split}_000000.bin", joined)
        print(f"  {split:9} {len(parts):4} modules {len(joined):9,} tokens")
    return write_corpus_json(
        folder,
        tokenizer={"name": ranks.stem, "ranks": ranks.name, "sha256": sha256_file(ranks)},
        vocab_size=encoding.n_vocab,
        bos_id=encoding.eot_token,
        source=f"standard library of Python {sys.version.split()[0]}",
    )


def stdlib_modules(max_characters: int) -> tuple[dict[str, str], int]:
    """Module name -> source, taken in the order of a hash of the name until `max_characters` are reached;
    and the number of modules passed over because they declare another encoding than UTF-8.

    The hash order makes a bounded sample representative, and independent of the file system's order.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not LEFT_OUT.intersection(parts):
            found[".".join(parts)] = path
    modules: dict[str, str] = {}
    num_characters, num_skipped = 0, 0
    for name in sorted(found, key=name_hash):
        try:
            text = found[name].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            num_skipped += 1
            continue
        if not text.strip():
            continue
        modules[name] = text
        num_characters += len(text)
        if num_characters >= max_characters:
            break
    if not modules:
        raise InputError(f"{root}: no readable Python source there; this Python came without its library's source")
    return modules, num_skipped


def name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def split_of(name: str) -> str:
    """The split of a module, by the lower hash bits (the upper ones decide which modules are read)."""
    position = (name_hash(name) % 2**20) / 2**20
    for split, share in SHARE_OF_SPLIT.items():
        if position < share:
            return split
        position -= share
    raise AssertionError("shares sum to 1")


def train_bpe(texts: list[str], num_tokens: int) -> list[bytes]:
    """Train a byte-level BPE with GPT-2's split pattern; token bytes by rank, (num_tokens,)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = byte_characters()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, initial_alphabet=list(alphabet), show_progress=sys.stderr.isatty()
    )
    tokenizer.train_from_iterator(texts, trainer)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if len(by_id) != num_tokens:
        raise InputError(
            f"the text supports only {len(by_id)} BPE tokens, {num_tokens} were asked for: lower the vocabulary"
        )
    return [bytes(alphabet[character] for character in token) for token, _ in by_id]


def byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (the alphabet `tokenizers` works in) -> the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


if __name__ == "__main__":
    command(main)
