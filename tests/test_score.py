"""Scoring: the numbers against the model itself, the tables against kills, mixtures and damage."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import train_gpt
from curriculum import reference, score
from curriculum.measures import MODEL_MEASURES, TEXT_MEASURES
from curriculum.reference import open_reference
from data.cli import InputError
from data.segments import corpus_segments
from data.shards import open_corpus, read_shard
from tests.test_train_gpt import tiny_config, tiny_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def reference_run(tiny_corpus, tmp_path_factory) -> Path:
    """A run of a few steps on the reference part of the tiny corpus."""
    out = tmp_path_factory.mktemp("reference") / "run"
    cfg = tiny_config(f"{tiny_corpus}/tiny_reference_*.bin", out, save_at=(0.3,))
    train_gpt.train(cfg, train_gpt.World())
    return out


@pytest.fixture(scope="session")
def scores(tiny_corpus, reference_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scores") / "scores"
    run(tiny_corpus, reference_run, out)
    return out


def run(corpus, reference, out, **options) -> None:
    score.main(str(corpus), reference=str(reference), out=out, **dict(max_len=64, unit_tokens=700) | options)


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_every_segment_is_scored_with_every_measure(tiny_corpus, scores):
    table = score.read_scores(scores)
    assert set(table.columns) == {*TEXT_MEASURES, *MODEL_MEASURES}
    corpus = open_corpus(tiny_corpus)
    assert table.segments.digest() == corpus_segments(corpus, 64).digest()
    assert table.segments.num_tokens == sum(len(read_shard(p)) - 1 for p in corpus.paths)
    for name, column in table.columns.items():
        may_be_nan = name in ("zstd_ratio", "nll_per_byte")  # segments without a byte
        assert np.isfinite(column).all() or may_be_nan, name


def test_mean_nll_is_the_references_own_loss(tiny_corpus, reference_run, scores):
    """The validation loss the reference logged during its training, and the scores of the validation shards."""
    table = score.read_scores(scores, "val")
    mean = np.average(table.columns["nll"], weights=table.segments.length_N)
    cfg = tiny_config(tiny_corpus, reference_run)
    work = train_gpt.prepare(cfg, print)
    model = train_gpt.GPT(cfg.model, 257)
    model.load_state_dict(train_gpt.load_checkpoint(reference_run / "last.pt")["model"])
    own = train_gpt.evaluate(model, work.val, work.val.num_tokens, cfg, train_gpt.World())["val_nats"]
    assert mean == pytest.approx(own, rel=1e-5)


def test_packed_scores_equal_one_by_one(tiny_corpus, reference_run, scores):
    """Each segment alone, through full float64 logits and the definitions of the measures."""
    table = score.read_scores(scores)
    saved = train_gpt.load_checkpoint(reference_run / "last.pt")
    model = train_gpt.GPT(tiny_config(tiny_corpus, reference_run).model, 257)
    model.load_state_dict(saved["model"])
    shards = [read_shard(path) for path in open_corpus(tiny_corpus).paths]
    for i in range(0, len(table.segments), 5):
        places = table.segments
        shard, start, length = places.shard_N[i], places.start_N[i], places.length_N[i]
        tokens = torch.tensor(shards[shard][start : start + length + 1].astype(np.int64))
        with torch.no_grad():
            docs = train_gpt.documents(np.array([0, length]), 64, torch.device("cpu"))
            x = (model.hidden(tokens[:-1], docs).double() @ model.head[:257].double().T).numpy()
        x = 15 * x / np.sqrt(x**2 + 15**2)
        logp = x - np.log(np.exp(x).sum(1, keepdims=True))
        nll = -logp[np.arange(length), tokens[1:].numpy()]
        H = -(np.exp(logp) * logp).sum(1)
        V = (np.exp(logp) * (logp + H[:, None]) ** 2).sum(1)
        num_bytes = int((tokens[1:] != 256).sum())
        expected = dict(
            nll=nll.mean(),
            nll_std=nll.std(),
            entropy=H.mean(),
            entropy_std=H.std(),
            varentropy=V.mean(),
            sqrt_varentropy=np.sqrt(V).mean(),
            entropy_last=H[-1],
            varentropy_last=V[-1],
            surprise_gap=(nll - H).mean(),
            surprise_z=(nll - H).sum() / np.sqrt(V.sum()),
            nll_per_byte=nll.sum() / num_bytes if num_bytes else np.nan,
        )
        for name, value in expected.items():
            # The gap and z are differences of nearly equal numbers: absolute error, of the size of nll's own.
            np.testing.assert_allclose(table.columns[name][i], value, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("features", ["anchor", "speed", "all"])
def test_a_checkpoint_scores_what_its_trainer_would_validate(tiny_corpus, tmp_path, monkeypatch, features):
    """With every technique: biases, windows, smear, ...; also where a CPU reads a row in pieces."""
    corpus = open_corpus(tiny_corpus)
    model, cfg = tiny_model(features, corpus.vocab_size), tiny_config(tiny_corpus, tmp_path, features)
    state = dict(model=model.state_dict(), vocab_size=corpus.vocab_size, config=cfg.model_dump(mode="json"), step=1)
    torch.save(state, tmp_path / "step1.pt")
    monkeypatch.setattr(reference, "CPU_PIECE", 64)
    opened = open_reference(str(tmp_path / "step1.pt"), corpus, 64, device="cpu")
    bounds = np.array([0, 3, 60, 124, 130], np.int32)
    tokens = np.random.default_rng(0).integers(0, 257, 131)
    found = opened.moments(tokens[:-1], tokens[1:], bounds)
    docs = train_gpt.documents(bounds, 64, torch.device("cpu"))
    with torch.no_grad():
        expected = model(torch.tensor(tokens[:-1]), torch.tensor(tokens[1:]), docs)
    torch.testing.assert_close(found.nll_N, expected, rtol=1e-4, atol=1e-5)


def test_learnability_is_what_later_training_gained(tiny_corpus, reference_run, scores, tmp_path):
    early = next(reference_run.glob("step*.pt"))
    run(tiny_corpus, reference_run, tmp_path / "two", early_reference=str(early))
    run(tiny_corpus, early, tmp_path / "early")
    two, one, late = (score.read_scores(p).columns for p in (tmp_path / "two", tmp_path / "early", scores))
    np.testing.assert_allclose(two["learnability"], one["nll"] - late["nll"], atol=1e-5)
    assert np.average(two["learnability"], weights=two["length"]) > 0


def test_model_free_scores_need_no_model(tiny_corpus, tmp_path):
    run(tiny_corpus, "none", tmp_path / "free")
    assert set(score.read_scores(tmp_path / "free").columns) == set(TEXT_MEASURES)


def test_killed_scorer_continues_to_the_same_bytes(tiny_corpus, reference_run, scores, tmp_path):
    out = tmp_path / "killed"
    line = [sys.executable, "-m", "curriculum.score", str(tiny_corpus), "--reference", str(reference_run)]
    line += ["--out", str(out), "--max-len", "64", "--unit-tokens", "700"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((out / "units").glob("[!.]*.parquet")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "scoring ended before it could be killed"
    with pytest.raises(InputError, match="not finished"):
        score.read_scores(out)
    run(tiny_corpus, reference_run, out)
    assert tables(out) == tables(scores)
    assert not (out / "units").exists()


def test_scoring_again_changes_nothing(tiny_corpus, reference_run, scores):
    before = {p: p.stat().st_mtime_ns for p in scores.glob("*.parquet")}
    run(tiny_corpus, reference_run, scores)
    assert before == {p: p.stat().st_mtime_ns for p in scores.glob("*.parquet")}


@pytest.mark.parametrize("change", [dict(max_len=32), dict(unit="window"), dict(unit_tokens=800), dict(row_tokens=99)])
def test_other_settings_are_never_mixed_in(tiny_corpus, reference_run, scores, change):
    before = tables(scores)
    with pytest.raises(InputError, match=f"other settings.*{next(iter(change))}"):
        run(tiny_corpus, reference_run, scores, **change)
    assert tables(scores) == before


def test_a_shard_that_changed_is_noticed(make_tiny_corpus, tmp_path):
    corpus = make_tiny_corpus(tmp_path / "corpus", train_tokens=600)
    run(corpus, "none", tmp_path / "scores")
    shutil.rmtree(corpus)
    make_tiny_corpus(corpus, train_tokens=600, seed=1)
    with pytest.raises(InputError, match="the shard has changed since"):
        run(corpus, "none", tmp_path / "scores")


def verify(folder: Path, **options) -> None:
    score.main(verify=folder, **options)


def tamper(folder: Path, name: str, change) -> None:
    """Change a column of the first training table behind its provenance's back."""
    path = next(folder.glob("*train*.parquet"))
    table = pq.read_table(path)
    columns = {n: table[n].to_numpy().copy() for n in table.column_names}
    columns[name] = change(columns[name]).astype(columns[name].dtype)
    score.write_table(path, columns, score.read_provenance(path))


def test_good_tables_verify_wherever_the_command_is_given(scores, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    verify(scores)
    printed = capsys.readouterr().out
    assert "64 of " in printed
    assert all(name in printed for name in (*TEXT_MEASURES, *MODEL_MEASURES))


@pytest.mark.parametrize("name", ["nll", "zstd_ratio", "entropy_last"])
def test_tampered_tables_do_not(scores, tmp_path, capsys, name):
    copy = tmp_path / "copy"
    shutil.copytree(scores, copy)
    tamper(copy, name, lambda column: column + 0.01)
    with pytest.raises(SystemExit) as stop:
        verify(copy, verify_segments=32)
    assert stop.value.code == 1
    assert f"{name} cannot be reproduced" in capsys.readouterr().err


def test_verifying_asks_for_the_same_reference_and_shards(
    tiny_corpus, make_tiny_corpus, reference_run, scores, tmp_path
):
    early = next(reference_run.glob("step*.pt"))
    with pytest.raises(InputError, match="reference of weights"):
        verify(scores, reference=str(early))
    with pytest.raises(InputError, match="other training shards"):
        score.main(str(make_tiny_corpus(tmp_path / "corpus", seed=1)), verify=scores)
    copy = tmp_path / "copy"
    shutil.copytree(scores, copy)
    (copy / "scored.json").unlink()
    with pytest.raises(InputError, match="where its shards lie"):
        verify(copy)
    score.main(str(tiny_corpus), reference=str(reference_run), verify=copy, verify_segments=2)


def test_per_token_output_is_what_the_measures_are_means_of(tiny_corpus, reference_run, scores, tmp_path):
    """Asked for after the tables were made: they stay as they are, to the byte."""
    out = tmp_path / "scores"
    shutil.copytree(scores, out)
    run(tiny_corpus, reference_run, out, per_token=True)
    assert tables(out) == tables(scores) and not (out / "units").exists()
    for path in sorted(out.glob("*.parquet")):
        table, tokens = pq.read_table(path), pq.read_table(out / "per_token" / path.name)
        assert score.read_provenance(path) == score.read_provenance(out / "per_token" / path.name)
        start_N = table["start"].to_numpy()
        for name in ("nll", "entropy", "varentropy"):
            column = tokens[name].to_numpy()
            assert column.dtype == np.float16 and len(column) == score.read_provenance(path)["num_tokens"] - 1
            mean_N = np.add.reduceat(column.astype(np.float64), start_N) / table["length"].to_numpy()
            np.testing.assert_allclose(mean_N, table[name], rtol=1e-3, atol=1e-4)
    before = tables(out / "per_token")
    shutil.rmtree(out)
    run(tiny_corpus, reference_run, out, per_token=True)
    assert tables(out) == tables(scores) and tables(out / "per_token") == before


def test_a_reference_with_another_tokenizer(tiny_corpus, reference_run, tmp_path):
    """Whether it is right is tested in test_retokenize; here, that scoring gives it the text and not the ids."""
    from tests.test_retokenize import renumbered, save_model, save_tokenizer, trained_bpe

    other, out = tmp_path / "other", tmp_path / "scores"
    save_model(other, "llama", 402)
    save_tokenizer(other, renumbered(trained_bpe(400), ["<s>", "</s>"]), bos_token="<s>", eos_token="</s>")
    run(tiny_corpus, other, out)
    table = score.read_scores(out)
    assert table.settings["reference"]["comparable"] == "nll_per_byte"
    assert 0 < table.columns["num_reference_tokens"].sum() < table.segments.num_tokens
    assert table.columns["num_unreadable_bytes"].sum() == 0
    run(tiny_corpus, other, tmp_path / "whole", unit_tokens=10**6)
    whole = score.read_scores(tmp_path / "whole")
    np.testing.assert_allclose(table.columns["nll_per_byte"], whole.columns["nll_per_byte"], rtol=1e-4, equal_nan=True)
    verify(out, verify_segments=16)
    with pytest.raises(InputError, match="predictions are not of these tokens"):
        run(tiny_corpus, other, tmp_path / "token", per_token=True)
    with pytest.raises(InputError, match="have different tokenizers"):
        run(tiny_corpus, other, tmp_path / "two", early_reference=str(reference_run))


def test_the_card_tells_datasets_where_the_tables_are(tiny_corpus, reference_run, tmp_path):
    datasets = pytest.importorskip("datasets")
    run(tiny_corpus, reference_run, tmp_path / "scores", per_token=True, row_tokens=256)
    score.write_card(tmp_path / "scores")
    loaded = datasets.load_dataset(str(tmp_path / "scores"), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "validation"):
        table = score.read_scores(tmp_path / "scores", split[:3] if split == "validation" else split)
        np.testing.assert_array_equal(loaded[split]["nll"], table.columns["nll"])
    tokens = datasets.load_dataset(str(tmp_path / "scores"), "per_token", cache_dir=str(tmp_path / "cache"))
    assert tokens["train"].num_rows == score.read_scores(tmp_path / "scores").segments.num_tokens


def test_pushing_without_a_hub_is_a_sentence(scores, tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route to the Hub")

    copy = tmp_path / "copy"
    shutil.copytree(scores, copy)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    with pytest.raises(InputError, match="someone/tables: not uploaded .no route.*lie complete"):
        score.push(copy, "someone/tables")


def test_what_is_missing_on_the_command_line_is_a_sentence(tiny_corpus, tmp_path):
    for arguments in ([""], ["x"], ["x", "none"]):
        with pytest.raises(InputError, match="expected SHARDS, --reference and --out"):
            score.main(*arguments)
    for change, sentence in (
        (dict(engine="spark"), "--engine spark"),
        (dict(per_token=True), "--per-token needs"),
        (dict(early_reference="x"), "--early-reference needs"),
    ):
        with pytest.raises(InputError, match=sentence):
            score.main(str(tiny_corpus), "none", tmp_path / "out", **change)


def test_a_second_scorer_is_refused(tiny_corpus, tmp_path):
    with score.hold_folder(tmp_path, score.this_launch()), pytest.raises(InputError, match="another scorer"):
        run(tiny_corpus, "none", tmp_path)


def test_validation_shards_are_no_training_data(tiny_corpus, tmp_path):
    with pytest.raises(InputError, match="validation shards"):
        run(f"{tiny_corpus}/*_val_*.bin", "none", tmp_path)


def test_a_damaged_table_is_a_sentence(scores, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(scores, copy)
    path = next(copy.glob("*train*.parquet"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="not a whole score table"):
        score.read_scores(copy)


def test_references_that_do_not_fit(tiny_corpus, make_tiny_corpus, reference_run, tmp_path):
    corpus = open_corpus(tiny_corpus)
    for name in ("nowhere.pt", "/no/such/folder"):
        with pytest.raises(InputError, match="no such checkpoint"):
            open_reference(name, corpus, 64)
    saved = train_gpt.load_checkpoint(reference_run / "last.pt")
    saved["vocab_size"] = 999
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(InputError, match="999 token ids.*257"):
        open_reference(str(tmp_path / "other.pt"), corpus, 64)
    saved["vocab_size"] = 257
    saved["model"]["head"][3, 4] = torch.nan
    torch.save(saved, tmp_path / "nan.pt")
    with pytest.raises(InputError, match="NaN"):
        open_reference(str(tmp_path / "nan.pt"), corpus, 64)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match="not a checkpoint of train_gpt.py"):
        open_reference(str(tmp_path / "foreign.pt"), corpus, 64)
