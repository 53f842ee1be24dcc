"""Exported shards: read as a stock trainer reads them, they hold the order's tokens, each once, and nothing else."""

import json
import shutil

import numpy as np
import pytest

from curriculum import score
from curriculum.loader import Stream, batches
from curriculum.measures import evaluate
from curriculum.order import build_order, draw_subset, load_order
from curriculum.order import main as make_order
from curriculum.schedules import parse
from data.cli import InputError
from data.segments import corpus_segments
from data.shards import open_corpus, read_shard
from data.tokenizer import of_corpus
from scripts import export
from tests.conftest import BOS_ID

MAX_LEN = 64


@pytest.fixture(scope="module", params=["document", "window"])
def unit(request):
    return request.param


@pytest.fixture(scope="module")
def scores(tiny_corpus, tmp_path_factory, unit):
    folder = tmp_path_factory.mktemp("scores") / unit
    score.main(str(tiny_corpus), "none", folder, max_len=MAX_LEN, unit=unit)
    return folder


@pytest.fixture(scope="module")
def order(scores, tmp_path_factory):
    path = tmp_path_factory.mktemp("orders") / "fold.npy"
    make_order(scores, path, measure="unigram_nll", schedule="fold(2)", bins=4)
    return path


def stock_tokens(folder) -> np.ndarray:
    """All shards of a folder end to end, as a trainer that knows only the stock format reads them."""
    parts = []
    for path in sorted(folder.glob("*_train_*.bin")):
        header = np.fromfile(path, "<i4", 256)
        assert header[:2].tolist() == [20240520, 1]
        parts.append(np.fromfile(path, "<u2", offset=1024))
        assert len(parts[-1]) == header[2]
    return np.concatenate(parts)


def inputs_of(corpus_folder, order_path, ids, *, bos=False) -> list[int]:
    """The inputs of segments by the definition of a segment, one after the other."""
    corpus, manifest = open_corpus(corpus_folder), load_order(order_path).manifest
    segments = corpus_segments(corpus, manifest["max_len"], manifest["unit"])
    found = []
    for i in ids:
        start = segments.start_N[i]
        piece = read_shard(corpus.paths[segments.shard_N[i]])[start : start + segments.length_N[i]].tolist()
        found += [BOS_ID] * (bos and piece[0] != BOS_ID) + piece
    return found


def test_the_exported_stream_is_the_one_the_loader_reads(tiny_corpus, order, tmp_path, unit):
    export.main(order, tmp_path / "out", str(tiny_corpus))
    ids = load_order(order).ids_N
    stream = Stream(open_corpus(tiny_corpus), corpus_segments(open_corpus(tiny_corpus), MAX_LEN, unit), ids)
    steps = -(-stream.num_tokens // 500)
    loaded = [part.input_T for batch in batches(stream, 500, 4, steps=steps) for part in batch.parts]
    exported = stock_tokens(tmp_path / "out")
    assert exported.tolist() == np.concatenate(loaded).tolist() == inputs_of(tiny_corpus, order, ids)


def test_a_whole_corpus_comes_out_with_all_its_tokens_but_each_shards_last(tiny_corpus, order, tmp_path):
    export.main(order, tmp_path / "out", str(tiny_corpus))
    held = np.concatenate([read_shard(path)[:-1] for path in open_corpus(tiny_corpus).paths])
    assert np.bincount(stock_tokens(tmp_path / "out")).tolist() == np.bincount(held).tolist()


def test_shards_are_cut_between_segments(tiny_corpus, order, tmp_path):
    export.main(order, tmp_path / "out", str(tiny_corpus), shard_tokens=700)
    lengths = [len(read_shard(path)) for path in open_corpus(tmp_path / "out").paths]
    loaded = load_order(order)
    segments = corpus_segments(open_corpus(tiny_corpus), MAX_LEN, loaded.manifest["unit"])
    assert set(np.cumsum(lengths).tolist()) <= set(np.cumsum(segments.length_N[loaded.ids_N]).tolist())
    assert max(lengths) <= 700 and min(lengths[:-1]) > 700 - MAX_LEN and sum(lengths) == segments.num_tokens
    assert stock_tokens(tmp_path / "out").tolist() == inputs_of(tiny_corpus, order, loaded.ids_N)


def test_what_was_written_is_a_corpus_of_ours(tiny_corpus, order, tmp_path):
    export.main(order, tmp_path / "out", str(tiny_corpus))
    made, source = open_corpus(tmp_path / "out"), open_corpus(tiny_corpus)
    assert (made.tokenizer, made.vocab_size, made.bos_id) == (source.tokenizer, source.vocab_size, source.bos_id)
    assert of_corpus(made).decode([104, 105]) == "hi"
    assert load_order(order).manifest["order_sha256"][:12] in made.source and source.source in made.source
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["num_tokens"] == load_order(order).manifest["num_tokens"] and about["bos_added"] == 0


def test_segments_without_bos_are_counted_and_given_one_on_request(tiny_corpus, order, tmp_path, capsys):
    loaded = load_order(order)
    segments = corpus_segments(open_corpus(tiny_corpus), MAX_LEN, loaded.manifest["unit"])
    shards = [read_shard(path) for path in open_corpus(tiny_corpus).paths]
    places = zip(segments.shard_N, segments.start_N, strict=True)
    bare = sum(shards[shard][start] != BOS_ID for shard, start in places)
    assert 0 < bare < len(segments)
    export.main(order, tmp_path / "as-is", str(tiny_corpus))
    assert f"begin without BOS: {bare} of {len(segments)}, written as they are" in capsys.readouterr().out
    export.main(order, tmp_path / "with", str(tiny_corpus), bos=True, shard_tokens=1000)
    assert f"begin without BOS: {bare} of {len(segments)}, given one each" in capsys.readouterr().out
    assert stock_tokens(tmp_path / "with").tolist() == inputs_of(tiny_corpus, order, loaded.ids_N, bos=True)
    assert all(read_shard(path)[0] == BOS_ID for path in open_corpus(tmp_path / "with").paths)


@pytest.mark.parametrize(
    ("measure", "schedule", "tokens"),
    [("unigram_nll", "fold(2)", 0), ("length", "random", 3000), ("unigram_nll", "placebo(increasing)", 3000)],
)
def test_each_folder_holds_its_bin_in_training_order(scores, tiny_corpus, tmp_path, measure, schedule, tokens):
    """The bins of `build_order` itself, also where values are tied at an edge (length) or bins are a placebo's."""
    path = tmp_path / "order.npy"
    make_order(scores, path, measure=measure, schedule=schedule, bins=4, tokens=tokens, seed=3)
    export.main(path, tmp_path / "out", str(tiny_corpus), by_bin=True, shard_tokens=500)
    table, ids = score.read_scores(scores), load_order(path).ids_N
    chosen = draw_subset(table.segments.length_N, tokens, 0)
    values = evaluate(measure, table.columns)[chosen]
    bin_of = dict(
        zip(chosen, build_order(values, table.segments.length_N[chosen], parse(schedule), 4, 3).bin_N, strict=True)
    )
    folders = sorted(p for p in (tmp_path / "out").iterdir() if p.is_dir())
    assert [p.name for p in folders] == ["bin00", "bin01", "bin02", "bin03"]
    for b, folder in enumerate(folders):
        inside = [i for i in ids if bin_of[i] == b]
        assert stock_tokens(folder).tolist() == inputs_of(tiny_corpus, path, inside)
        assert open_corpus(folder).tokenizer["ranks"] in [p.name for p in folder.iterdir()]
    assert sum(len(stock_tokens(folder)) for folder in folders) == load_order(path).manifest["num_tokens"]


def test_a_failure_in_the_middle_leaves_nothing_behind(tiny_corpus, order, tmp_path, monkeypatch):
    write = export.write_shard

    def full_disk(path, tokens):
        if path.name.endswith("2.bin"):
            raise OSError(28, "No space left on device", str(path))
        write(path, tokens)

    monkeypatch.setattr(export, "write_shard", full_disk)
    with pytest.raises(OSError, match="No space"):
        export.main(order, tmp_path / "out", str(tiny_corpus), shard_tokens=700)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "options", "sentence"),
    [
        (None, dict(shards=""), r"--shards is missing: .* holds tiny_train_000000\.bin and 1 more"),
        (None, dict(shard_tokens=MAX_LEN - 1), r"--shard-tokens 63: expected 64 \(the longest segment\) to 2147483647"),
        (None, dict(shard_tokens=2**31), "--shard-tokens 2147483648: expected 64"),
        ("out", {}, "out: already there"),
        ("shard", {}, r"1 of the order's 2 shards are missing: tiny_train_000001\.bin"),
        ("ranks", {}, "the file was changed"),
        ("contents", {}, "an order of other shards"),
        ("scores", dict(by_bin=True), "no score table of train shards there"),
        ("other scores", dict(by_bin=True), "the order was made from"),
    ],
)
def test_refused_with_nothing_written(tiny_corpus, make_tiny_corpus, tmp_path, spoil, options, sentence):
    corpus, scores, path, out = (tmp_path / name for name in ("corpus", "scores", "order.npy", "out"))
    shutil.copytree(tiny_corpus, corpus)
    score.main(str(corpus), "none", scores, max_len=MAX_LEN)
    make_order(scores, path, measure="unigram_nll", bins=4)
    match spoil:
        case "out":
            out.mkdir()
        case "shard":
            (corpus / "tiny_train_000001.bin").unlink()
        case "ranks":
            ranks = corpus / "tiny_bytes.tiktoken"
            first, second, *rest = ranks.read_text().splitlines()
            swapped = [f"{first.split()[0]} 1", f"{second.split()[0]} 0"]
            ranks.write_text("\n".join(swapped + rest))
        case "contents":
            shutil.rmtree(corpus)
            make_tiny_corpus(corpus, seed=1)
        case "scores":
            shutil.rmtree(scores)
        case "other scores":
            shutil.rmtree(scores)
            score.main(str(corpus), "none", scores, max_len=MAX_LEN // 2)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=sentence):
        export.main(path, out, **dict(shards=str(corpus)) | options)
    assert sorted(tmp_path.iterdir()) == before and not (out.exists() and any(out.iterdir()))
