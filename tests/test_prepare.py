"""data.prepare: what it reads, what it writes, and what is there after a kill at any moment."""

import gzip
import json
import lzma
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import prepare, sources, tokenizer
from data.cli import InputError
from data.files import read_json, sha256_file
from data.sample import train_bpe
from data.shards import open_corpus, read_shard

TEXTS = [f"Document {i}: " + "the cat, the dog and the 17 birds\n" * (i % 7) + "é漢" * (i % 3) for i in range(200)]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("ranks") / "tiny.tiktoken"
    tokenizer.write_ranks(path, train_bpe(TEXTS, 300))
    return str(path)


@pytest.fixture(scope="module")
def encoding(ranks):
    return tokenizer.from_ranks(ranks)


@pytest.fixture
def make(ranks, tmp_path):
    """Run a small job in this process: `make(*sources)` gives the folder it made."""

    def make(*sources, out="out", **options) -> Path:
        options = {"tokenizer": ranks, "workers": 1} | options
        prepare.main(tuple(map(str, sources)), out=tmp_path / out, **options)
        return tmp_path / out

    return make


def write_lines(path: Path, texts: list) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def documents(folder: Path, split: str) -> list[str]:
    """The texts of a split, in order, read back from its shards."""
    if not list(folder.glob(f"*_{split}_*.bin")):
        return []
    corpus = open_corpus(folder, split, quiet=True)
    encoding = tokenizer.of_corpus(corpus)
    tokens = np.concatenate([read_shard(path) for path in corpus.paths])
    assert tokens[0] == corpus.bos_id
    parts = np.split(tokens, np.flatnonzero(tokens == corpus.bos_id)[1:])
    return [tokenizer.decode(encoding, part).decode() for part in parts]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


# ---------------------------------------------------------------- tokens


PIECES = [*" \n\t\x1c\u3000a1!'é漢", "<|endoftext|>", "     \n   ", "'s", "word"]


@given(st.lists(st.lists(st.sampled_from(PIECES)).map("".join)))
def test_tokens_are_tiktokens_own(encoding, texts):
    expected = [token for text in texts for token in (encoding.eot_token, *encoding.encode_ordinary(text))]
    assert prepare.encode_documents(texts, encoding).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:  # the path of very long documents, every run of white space cut
        patch.setattr(prepare, "PANIC_CHARACTERS", 0)
        patch.setattr(prepare, "LONG_SPACE", re.compile(prepare.LONG_SPACE.pattern.replace("10000", "2")))
        assert prepare.encode_documents(texts, encoding).tolist() == expected


def test_white_space_on_which_tiktoken_panics(encoding):
    text = "a" + " " * 1_200_000 + "b"
    tokens = prepare.encode_documents([text], encoding)
    assert tokens.dtype == np.uint16 and tokenizer.decode(encoding, tokens).decode() == text


# ---------------------------------------------------------------- formats


def compressed_zstd(data: bytes) -> bytes:
    import zstandard

    half = len(data) // 2  # two frames, as `cat a.zst b.zst` makes them
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))


COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": compressed_zstd}


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_json_lines(make, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)
    source = tmp_path / f"a.jsonl{suffix}"
    source.write_bytes(COMPRESS.get(suffix, bytes)(write_lines(tmp_path / "plain.jsonl", TEXTS).read_bytes()))
    assert documents(make(source, val_fraction=0), "train") == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_truncated_file_is_an_error_and_no_corpus(make, tmp_path, suffix):
    whole = COMPRESS[suffix](write_lines(tmp_path / "plain.jsonl", TEXTS).read_bytes())
    source = tmp_path / f"a.jsonl{suffix}"
    source.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="damaged or cut short"):
        make(source)
    assert not (tmp_path / "out").exists()


def test_text_files_of_a_folder(make, tmp_path, capsys):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.md").write_text("second")
    (folder / "a.txt").write_text("first\n")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"third"))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    assert documents(make(folder, val_fraction=0), "train") == ["first\n", "third", "second"]
    assert "1 of 4 files are of another kind" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_parquet(make, tmp_path, kind):
    import pyarrow as pa
    from pyarrow import parquet

    column = pa.array([*TEXTS, None], pa.string())
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    parquet.write_table(pa.table({"id": range(201), "body": column}), tmp_path / "a.parquet", row_group_size=70)
    out = make(tmp_path / "a.parquet", field="body", val_fraction=0)
    assert documents(out, "train") == TEXTS
    assert read_json(out / "prepare.json")["progress"]["bad"] == {prepare.NOT_TEXT: 1}


def test_parquet_without_the_column_and_with_bad_bytes(make, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    bad = pa.array([b"good", b"\xff bad"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"other": ["x"] * 300}), tmp_path / "b.parquet")
    out = make(tmp_path / "a.parquet", tmp_path / "b.parquet", val_fraction=0)
    assert documents(out, "train") == ["good"]
    assert read_json(out / "prepare.json")["progress"]["bad"] == {prepare.NOT_UNICODE: 1, prepare.NO_FIELD: 300}


def test_hub_dataset(make, monkeypatch):
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    asked = []

    def load_dataset(*args, **options):
        asked.append((*args, options["split"], options["revision"]))
        rows = datasets.Dataset.from_dict({"text": [*TEXTS, None], "id": range(201)})
        return rows.to_iterable_dataset()

    info = SimpleNamespace(sha="commit-1")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repo, revision, timeout: info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents(make("hf:org/name:config:test", val_fraction=0), "train") == TEXTS
    assert documents(make("org/name", val_fraction=0, out="two"), "train") == TEXTS
    assert asked == [("org/name", "config", "test", "commit-1"), ("org/name", None, "train", "commit-1")]


def test_hub_out_of_reach(make, monkeypatch):
    pytest.importorskip("datasets")
    import huggingface_hub

    def dataset_info(self, repo, revision, timeout):
        raise ConnectionError("no network\nmore lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    with pytest.raises(InputError, match=r"org/name: .*\(ConnectionError: no network\); check the name"):
        make("org/name")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [("missing.jsonl", "no such file"), ("picture.png", "suffix '.png'"), ("empty", "none of its 0 files")],
)
def test_sources_that_cannot_be_read(make, tmp_path, source, sentence):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=sentence):
        make(tmp_path / source)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- bad rows

BAD_LINES = {
    b'{"text": "cut': prepare.NOT_JSON,
    b"[" * 100_000: prepare.NOT_JSON,
    b'{"text": "\xff"}': prepare.NOT_UNICODE,
    b'{"text": "\\ud83d"}': prepare.NOT_UNICODE,
    b'{"body": "x"}': prepare.NO_FIELD,
    b'["text"]': prepare.NO_FIELD,
    b'{"text": 7}': prepare.NOT_TEXT,
    b'{"text": null}': prepare.NOT_TEXT,
    b'{"text": " \\n"}': prepare.EMPTY,
    b"": prepare.EMPTY,
}


def test_bad_rows_are_counted_by_kind(make, tmp_path, capsys):
    lines = [line for bad in BAD_LINES for line in (bad, b'{"text": "good"}')]
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(lines))
    out = make(tmp_path / "a.jsonl", val_fraction=0)
    assert documents(out, "train") == ["good"] * 10
    expected = {kind: list(BAD_LINES.values()).count(kind) for kind in BAD_LINES.values()}
    assert read_json(out / "prepare.json")["progress"]["bad"] == expected
    assert "left out: 10 bad rows (2 not JSON, 2 not valid Unicode" in capsys.readouterr().out


def test_all_rows_bad_is_fatal_and_leaves_nothing(make, tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(InputError, match=r"200 bad rows \(200 no such field\); is --field right"):
        make(tmp_path / "a.jsonl", field="txet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_text_beyond_the_limit_is_a_bad_row(make, tmp_path, monkeypatch):
    for module in (prepare, sources):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "long.txt").write_text("x" * 101)
    (tmp_path / "fits.txt").write_text("x" * 100)
    out = make(tmp_path / "long.txt", tmp_path / "fits.txt", val_fraction=0)
    assert read_json(out / "prepare.json")["progress"]["bad"] == {prepare.TOO_LONG: 1}


# ---------------------------------------------------------------- splits and shards


def test_splits_are_disjoint_and_a_function_of_the_text(make, tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    write_lines(tmp_path / "b.jsonl", [*TEXTS[::-1], *TEXTS[:50]])
    splits = []
    for name in ("a", "b"):
        out = make(tmp_path / f"{name}.jsonl", out=name, val_fraction=0.1, reference_fraction=0.3)
        splits.append({split: set(documents(out, split)) for split in prepare.SPLITS})
    assert splits[0] == splits[1]
    assert sum(map(len, splits[0].values())) == len(set(TEXTS)) == len(set().union(*splits[0].values()))
    assert 5 <= len(splits[0]["val"]) <= 40 and 30 <= len(splits[0]["reference"]) <= 90
    more = make(tmp_path / "a.jsonl", out="more", val_fraction=0.2, reference_fraction=0.4)
    for split in ("val", "reference"):
        assert splits[0][split] < set(documents(more, split)), "a larger fraction only adds documents"


def test_shards_end_between_documents(make, tmp_path):
    out = make(write_lines(tmp_path / "a.jsonl", TEXTS), shard_tokens=500, val_fraction=0)
    corpus = open_corpus(out)
    shards = [read_shard(path) for path in corpus.paths]
    assert len(shards) > 5 and all(shard[0] == corpus.bos_id for shard in shards)
    assert all(400 < len(shard) <= 500 for shard in shards[:-1])
    assert documents(out, "train") == TEXTS


def test_a_document_longer_than_a_shard_goes_on_in_the_next(make, tmp_path):
    texts = ["short", "x" * 250, "end"]
    ranks = tmp_path / "bytes.tiktoken"
    tokenizer.write_ranks(ranks, [bytes([b]) for b in range(256)])
    out = make(write_lines(tmp_path / "a.jsonl", texts), tokenizer=str(ranks), shard_tokens=100, val_fraction=0)
    assert [len(read_shard(path)) for path in open_corpus(out).paths] == [6, 100, 100, 51 + 4]
    assert documents(out, "train") == texts


def test_max_tokens_is_a_limit(make, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    out = make(source, max_tokens=2000, reference_fraction=0.3)
    held = [text for split in prepare.SPLITS for text in documents(out, split)]
    num_tokens = sum(counts["tokens"] for counts in read_json(out / "prepare.json")["progress"]["splits"].values())
    assert sorted(held) == sorted(TEXTS[: len(held)]) and 1800 < num_tokens <= 2000
    with pytest.raises(InputError, match="--max-tokens is shorter than the first one"):
        make(source, max_tokens=1, out="none")


def test_any_number_of_workers_writes_the_same_bytes(make, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = make(source, out="one/x", shard_tokens=1000)
    assert contents(one) == contents(make(source, out="two/x", shard_tokens=1000, workers=2))


def test_the_corpus_describes_itself(make, tmp_path, ranks):
    out = make(write_lines(tmp_path / "a.jsonl", TEXTS))
    assert sorted(path.name for path in out.iterdir()) == [
        "corpus.json",
        "out_train_000000.bin",
        "out_val_000000.bin",
        "prepare.json",
        "tiny.tiktoken",
    ]
    corpus = open_corpus(out)
    assert (corpus.vocab_size, corpus.bos_id) == (301, 300)
    assert corpus.tokenizer == {"name": "tiny", "ranks": "tiny.tiktoken", "sha256": sha256_file(ranks)}
    assert corpus.known_sha256 == {path.name: sha256_file(path) for path in corpus.paths}


# ---------------------------------------------------------------- kills, second runs


class Killed(BaseException):
    """Stands in for kill -9 within this process: nothing of ours catches it."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_commit_it_ends_with_the_same_bytes(make, tmp_path, monkeypatch, when):
    """A commit is a rename, and the nth run dies at its nth one. The job moves on all the same, nothing appears
    before its end, and what then appears is what an undisturbed run makes.
    """
    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    options = dict(shard_tokens=2000, reference_fraction=0.3, max_tokens=9000)
    (tmp_path / "calm").mkdir()
    undisturbed = contents(make(source, out="calm/out", **options))
    out, work = tmp_path / "out", tmp_path / ".out.prepare"

    for num_allowed in range(100):
        renames = 0

        def dying(real, num_allowed=num_allowed):
            def rename(a, b):
                nonlocal renames
                renames += 1
                if renames > num_allowed and when == "before":
                    raise Killed
                real(a, b)
                if renames > num_allowed:
                    raise Killed

            return rename

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(os, "rename", dying(os.rename))
            try:
                make(source, **options)
                break
            except Killed:
                pass
        if not work.exists():
            break
        assert not out.exists()
        if list(work.glob("*.bin")):
            assert read_json(work / "corpus.json")["tokenizer"]["name"] == "tiny", "shards would be read as GPT-2's"
    assert 3 < num_allowed < 99
    assert contents(out) == undisturbed and not work.exists()


KILL_AFTER = """
import os, signal, sys
from data import prepare, sources
save, num_saves = prepare.save, 0
def save_and_die(*args):
    global num_saves
    save(*args)
    num_saves += 1
    if num_saves == 4:
        os.kill(os.getpid(), signal.SIGKILL)
prepare.save, sources.BATCH_BYTES = save_and_die, 1000
if __name__ == "__main__":
    prepare.command(prepare.main)
"""


def test_kill_9_with_worker_processes(make, tmp_path, ranks, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    (tmp_path / "killed.py").write_text(KILL_AFTER)
    arguments = [str(source), "--out", str(out), "--tokenizer", ranks, "--shard-tokens", "1000", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Reading its output to the end returns only when the workers, which share it, are gone too.
    killed = subprocess.run(
        [sys.executable, tmp_path / "killed.py", *arguments], env=environment, capture_output=True, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    held = read_json(tmp_path / ".out.prepare" / "prepare.json")["progress"]
    assert prepare.total_shards(held) >= 3

    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)
    encode_rows, num_batches = prepare.encode_rows, []
    monkeypatch.setattr(prepare, "encode_rows", lambda *a, **o: num_batches.append(1) or encode_rows(*a, **o))
    make(source, shard_tokens=1000)
    num_batches_left = len(num_batches)
    (tmp_path / "calm").mkdir()
    undisturbed = make(source, out="calm/out", shard_tokens=1000)
    assert num_batches_left == len(num_batches) - num_batches_left - held["batch"], "finished work was done again"
    assert contents(out) == contents(undisturbed)


def test_a_second_run_has_nothing_to_do(make, tmp_path, capsys):
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    before = contents(make(source))
    assert contents(make(source, workers=2)) == before
    assert "already done" in capsys.readouterr().out


def test_another_job_is_refused(make, tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    make(source)
    with pytest.raises(InputError, match="another job.*val_fraction is 0.01 there, not 0.2"):
        make(source, val_fraction=0.2)
    write_lines(source, TEXTS[:100])
    with pytest.raises(InputError, match="another job.*source_digest"):
        make(source)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "tokenise", stop)
        make(source, out="half")
    with pytest.raises(InputError, match="another job.*shard_tokens"):
        make(source, out="half", shard_tokens=1000)


def test_a_folder_of_somebody_else_is_refused(make, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not made by data.prepare"):
        make(source)
    (tmp_path / "out" / "notes.txt").unlink()
    assert documents(make(source, val_fraction=0), "train") == TEXTS  # an empty folder may be filled


def test_two_at_a_time_are_refused(make, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    with prepare.sole_writer(tmp_path / ".out.prepare"), pytest.raises(InputError, match="another data.prepare"):
        make(source)


def test_lost_bytes_are_noticed(make, tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        finish_shard = prepare.SplitWriter.finish_shard
        patch.setattr(prepare.SplitWriter, "finish_shard", lambda w: stop_after(w, finish_shard))
        make(source, shard_tokens=2000)
    part = max((tmp_path / ".out.prepare").glob("*_train_*.part"))
    os.truncate(part, 2)
    with pytest.raises(InputError, match="1 tokens, expected .*start anew"):
        make(source, shard_tokens=2000)


def stop_after(writer, finish_shard) -> None:
    if writer.counts["shards"] == 2:
        raise KeyboardInterrupt
    finish_shard(writer)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"val_fraction": 1.0}, "--val-fraction 1.0"),
        ({"val_fraction": 0.5, "reference_fraction": 0.5}, "leave nothing to train on"),
        ({"shard_tokens": 0}, "--shard-tokens 0"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"workers": -1}, "--workers -1"),
        ({"name": "a b"}, "--name 'a b'"),
        ({"name": "my_val_set"}, "the names of splits"),
        ({"tokenizer": "none.tiktoken"}, "no such rank file"),
    ],
)
def test_options_that_cannot_work(make, tmp_path, options, sentence):
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(InputError, match=sentence):
        make(source, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_vocabulary_too_large_for_uint16(make, tmp_path):
    pairs = [bytes([a, b]) for a in range(255) for b in range(256)]
    tokenizer.write_ranks(tmp_path / "big.tiktoken", [*(bytes([b]) for b in range(256)), *pairs])
    with pytest.raises(InputError, match="65537 ids, but a shard's uint16 tokens hold at most 65536"):
        make(write_lines(tmp_path / "a.jsonl", TEXTS), tokenizer=str(tmp_path / "big.tiktoken"))


def test_help_is_instant_because_nothing_heavy_is_imported():
    heavy = "{'torch', 'tiktoken', 'pyarrow', 'datasets', 'huggingface_hub', 'tqdm'}"
    code = f"import sys, data.prepare, data.download; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
