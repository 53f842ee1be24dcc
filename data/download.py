"""Token shards that others have made: FineWeb and FineWeb-Edu as GPT-2 tokens, from the Hugging Face Hub.

    python -m data.download --dataset fineweb10B --shards 10         # data/fineweb10B: 1e9 tokens and validation

A shard of 100M tokens is 0.2 GB. Shards that are there and whole are kept, so the same command continues after
anything that stopped it. No corpus.json is written: shards without one are read as GPT-2's, which these are.
"""

import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from data.cli import InputError, command
from data.shards import GPT2, check_vocab, read_shard

SHARD_BYTES = 200_001_024  # 100M tokens of 2 bytes and the header; the last shard of a dataset is shorter


class Dataset(NamedTuple):
    """Shards of the Hub: training shards are numbered from 1, validation is number 0."""

    repo: str
    file: str
    num_shards: int  # for training


# Repositories, file names and counts as their makers' own download scripts have them:
#   github.com/KellerJordan/modded-nanogpt  data/cached_fineweb10B.py, cached_fineweb100B.py, cached_finewebedu10B.py
#   github.com/karpathy/llm.c               dev/data/edu_fineweb.sh
# (finewebedu10B: the script says 103, but users who have all of it list 99 files, the last of 53,989,344 tokens.)
DATASETS = {
    "fineweb10B": Dataset("kjj0/fineweb10B-gpt2", "fineweb_{split}_{number:06d}.bin", 103),
    "fineweb100B": Dataset("kjj0/fineweb100B-gpt2", "fineweb_{split}_{number:06d}.bin", 1030),
    "finewebedu10B": Dataset("kjj0/finewebedu10B-gpt2", "finewebedu_{split}_{number:06d}.bin", 99),
    "finewebedu100B": Dataset(
        "karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_fineweb_{split}_{number:06d}.bin", 1001
    ),
}


def main(
    dataset: Literal["fineweb10B", "fineweb100B", "finewebedu10B", "finewebedu100B"] = "fineweb10B",
    shards: int = 10,
    out: Path | None = None,
) -> None:
    """Download training shards, from the first one on, and the validation shard. All are GPT-2 tokens.

    Args:
        dataset: which text; the number is about how many tokens there are.
        shards: how many training shards of 100M tokens (0.2 GB) each; there are 103, 1030, 99 and 1001.
        out: folder for the shards; None means data/DATASET.
    """
    meant = DATASETS[dataset]
    if not 1 <= shards <= meant.num_shards:
        raise InputError(f"--shards {shards}: {dataset} has 1 to {meant.num_shards} training shards")
    out = out if out is not None else Path("data") / dataset
    names = [meant.file.format(split="val", number=0)]
    names += [meant.file.format(split="train", number=number) for number in range(1, shards + 1)]
    reasons = {name: why_bad(out / name) for name in names}
    missing = [name for name in names if reasons[name]]
    print(f"{dataset}: {len(names) - len(missing)} of {len(names)} shards are in {out}")
    for name in missing:
        if (out / name).exists():
            print(f"  to be replaced: {reasons[name]}")
    if missing:
        out.mkdir(parents=True, exist_ok=True)
        refuse_if_no_room(out, len(missing))
        fetch_all(meant.repo, missing, out)
    num_tokens = sum(len(read_shard(out / name)) for name in names[1:])
    print(f"{out}: whole; {num_tokens:,} training tokens, {len(read_shard(out / names[0])):,} for validation")


def fetch_all(repo: str, names: list[str], out: Path) -> None:
    """Download files of one commit of `repo`. One that is bad twice does not stop the others; then InputError."""
    commit = latest_commit(repo)
    bad = []
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", flush=True)
        if fetch(repo, commit, name, out) and (reason := fetch(repo, commit, name, out, again=True)):
            bad.append(reason)
    if bad:
        raise InputError(f"{len(bad)} of {len(names)} files of {repo} were bad twice and are removed: {'; '.join(bad)}")


def latest_commit(repo: str) -> str:
    """The dataset's commit: all shards are taken from the same one. Asked once, so that no network is soon known."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repo, timeout=10).sha
    except Exception as error:  # the Hub's client lets whatever its HTTP library raises through
        raise unreachable(repo, error) from None


def fetch(repo: str, commit: str, name: str, out: Path, *, again: bool = False) -> str:
    """Download one file and check it; "" if it is good, else it is removed and the reason returned."""
    from huggingface_hub import hf_hub_download

    (out / name).unlink(missing_ok=True)  # the Hub's client would keep a damaged file that has the right date
    try:
        hf_hub_download(
            repo, name, repo_type="dataset", revision=commit, local_dir=out, force_download=again, etag_timeout=10
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # our disk, not the network
        raise unreachable(f"{repo}/{name}", error) from None
    reason = why_bad(out / name, every_token=True)
    if reason:
        print(f"  bad: {reason}", flush=True)
        (out / name).unlink(missing_ok=True)
    return reason


def why_bad(path: Path, *, every_token: bool = False) -> str:
    """Why `path` is no whole GPT-2 shard; "" if it is one."""
    try:
        tokens = read_shard(path)
        if every_token:
            check_vocab(path, tokens, GPT2["vocab_size"])
    except InputError as error:
        return str(error)
    return ""


def refuse_if_no_room(out: Path, num_files: int) -> None:
    free = shutil.disk_usage(out).free
    if num_files * SHARD_BYTES > free:
        raise InputError(
            f"{out}: {num_files} shards need {num_files * SHARD_BYTES / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB "
            "free; ask for fewer --shards or choose another --out"
        )


def unreachable(what: str, error: Exception) -> InputError:
    details = (str(error).splitlines() or ["no details"])[0]
    return InputError(
        f"{what} cannot be had from the Hugging Face Hub ({type(error).__name__}: {details}); check the network, then "
        "run the same command to continue; with none, data.sample or data.prepare make shards from what is here"
    )


if __name__ == "__main__":
    command(main)
