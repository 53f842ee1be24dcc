"""data.download with a Hub that is a function: good, truncated and wrong files, and no network."""

from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import huggingface_hub
import numpy as np
import pytest

from data import download
from data.cli import InputError
from data.shards import open_corpus, read_shard, write_shard


@pytest.fixture
def hub(monkeypatch):
    """A Hub that serves small shards. `broken[name]`: how often `name` comes truncated; `asked`: what was asked for."""
    state = SimpleNamespace(asked=[], broken={}, tokens=np.array([50256, 1, 2, 3], np.uint16))

    def hf_hub_download(repo_id, filename, *, repo_type, revision, local_dir, force_download, etag_timeout):
        assert repo_type == "dataset" and revision == "commit-1"
        assert not (Path(local_dir) / filename).exists(), "a bad file must be gone before it is fetched again"
        state.asked.append((filename, force_download))
        path = Path(local_dir) / filename
        write_shard(path, state.tokens)
        if state.broken.get(filename, 0):
            state.broken[filename] -= 1
            path.write_bytes(path.read_bytes()[:-2])
        return str(path)

    info = SimpleNamespace(sha="commit-1")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repo, timeout: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return state


def test_good_shards_are_stock_shards(hub, tmp_path, capsys):
    download.main("fineweb10B", shards=2, out=tmp_path / "shards")
    names = ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"]
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == names
    corpus = open_corpus(tmp_path / "shards", quiet=True)
    assert corpus.tokenizer == {"name": "gpt2"} and len(corpus.paths) == 2
    assert "8 training tokens, 4 for validation" in capsys.readouterr().out


def test_whole_files_are_kept_and_only_the_rest_is_fetched(hub, tmp_path):
    write_shard(tmp_path / "fineweb_train_000001.bin", np.array([50256, 7], np.uint16))
    (tmp_path / "fineweb_val_000000.bin").write_bytes(b"cut short")
    download.main("fineweb10B", shards=2, out=tmp_path)
    assert [name for name, _ in hub.asked] == ["fineweb_val_000000.bin", "fineweb_train_000002.bin"]
    assert read_shard(tmp_path / "fineweb_train_000001.bin").tolist() == [50256, 7]
    hub.asked.clear()
    download.main("fineweb10B", shards=2, out=tmp_path)
    assert hub.asked == []


def test_a_truncated_file_is_fetched_once_more(hub, tmp_path):
    hub.broken["fineweb_train_000001.bin"] = 1
    download.main("fineweb10B", shards=1, out=tmp_path)
    assert hub.asked[1:] == [("fineweb_train_000001.bin", False), ("fineweb_train_000001.bin", True)]


def test_a_file_bad_twice_is_reported_after_the_others(hub, tmp_path):
    hub.broken["fineweb_train_000001.bin"] = 2
    with pytest.raises(InputError, match="1 of 3 files.*bad twice.*fineweb_train_000001.bin.*truncated"):
        download.main("fineweb10B", shards=2, out=tmp_path)
    assert not (tmp_path / "fineweb_train_000001.bin").exists()
    assert (tmp_path / "fineweb_train_000002.bin").exists()


def test_tokens_outside_the_vocabulary_are_bad(hub, tmp_path):
    hub.tokens = np.array([50256, 60000], np.uint16)
    with pytest.raises(InputError, match="token id 60000"):
        download.main("fineweb10B", shards=1, out=tmp_path)


def test_offline_is_one_sentence_and_exit_2(hub, tmp_path, monkeypatch, capsys):
    def dataset_info(self, repo, timeout):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled\nwith more lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr("sys.argv", ["download", "--shards", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        download.command(download.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: kjj0/fineweb10B-gpt2 cannot be had") and error.count("\n") == 1


def test_network_lost_on_the_way_keeps_what_is_there(hub, tmp_path, monkeypatch):
    good = huggingface_hub.hf_hub_download

    def lost(repo, name, **options):
        if name == "fineweb_train_000002.bin":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")
        return good(repo, name, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lost)
    with pytest.raises(InputError, match="fineweb_train_000002.bin cannot be had"):
        download.main("fineweb10B", shards=2, out=tmp_path)
    assert len(read_shard(tmp_path / "fineweb_train_000001.bin")) == 4


@pytest.mark.parametrize("shards", [0, 104])
def test_more_shards_than_there_are(shards, tmp_path):
    with pytest.raises(InputError, match="fineweb10B has 1 to 103"):
        download.main("fineweb10B", shards=shards, out=tmp_path)


def test_no_room_on_the_disk(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
    with pytest.raises(InputError, match="3 shards need 0.6 GB, the disk has 0.1 GB"):
        download.main("fineweb10B", shards=2, out=tmp_path)
    assert hub.asked == []


def test_every_dataset_can_be_chosen():
    assert get_args(get_type_hints(download.main)["dataset"]) == tuple(download.DATASETS)
    for dataset in download.DATASETS.values():
        assert dataset.file.format(split="train", number=1).endswith("_train_000001.bin")
