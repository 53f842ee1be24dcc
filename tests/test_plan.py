"""The planner says what the loader and the trainer will do, and refuses what they would refuse."""

import json
from itertools import pairwise

import numpy as np
import pytest

from curriculum import order as orders
from curriculum import score
from curriculum.config import validate
from curriculum.loader import UNCUT, documents_of_parts, most_documents
from curriculum.loader import plan as steps_of
from curriculum.runs import prepare
from data.cli import InputError
from scripts import plan


@pytest.fixture(scope="module")
def made(tiny_corpus, tmp_path_factory):
    """An order that leaves some of the corpus out and repeats some, and one that uses it once."""
    folder = tmp_path_factory.mktemp("scores")
    score.main(str(tiny_corpus), "none", folder / "scores", max_len=64)
    shared = dict(scores=folder / "scores", measure="length", bins=4)
    orders.main(out=folder / "once.npy", schedule="increasing", **shared)
    orders.main(out=folder / "tilt.npy", schedule="tilt(6, 6)", multiset="reweight", **shared)
    return tiny_corpus, folder


def config(made, order: str, **run):
    data = dict(shards=str(made[0]), seq_len=64, batch_tokens=512, micro_batch_tokens=128, val_tokens=500)
    data["order"] = str(made[1] / order) if order else ""
    return validate(
        dict(run=run, data=data, model=dict(num_layers=2, model_dim=32, head_dim=16, num_value_embeds=1)), "test"
    )


def test_documents_are_counted_as_the_loader_packs_them(made):
    work = prepare(config(made, "once.npy"), print)
    for max_len in (UNCUT, 20):
        whole = steps_of(work.train.num_tokens, 300, 3, 12, max_len)
        counts = [
            len(work.train.read(a, b, max_len).bounds) - 1 for step in range(12) for a, b in pairwise(whole.cuts(step))
        ]
        assert documents_of_parts(work.train, whole).tolist() == counts
        assert most_documents(work.train, 300, 3, steps=12, max_len=max_len) == max(counts)


def test_a_plan_says_how_much_of_what_is_used(made):
    told = plan.plan(config(made, "once.npy", steps=6))
    num_tokens = prepare(config(made, "once.npy"), lambda note: None).train.num_tokens
    assert told["tokens"] == f"3,072, {3072 / num_tokens:.1%} of the order"
    assert told["steps"] == "6 of 512 tokens, 4 micro-batches each"
    assert told["epochs"].startswith("1 uses of a segment on average, at most 1")
    assert told["bins"].startswith("4 of length; bin 0 ends first") and "bin 3 last, at 1.00" in told["bins"]
    assert told["unused"].startswith("bin 3 keeps") and "bin 0 0%" in told["unused"]
    assert "stops after 3,072" in told["note 1"]
    whole = plan.plan(config(made, "once.npy"))
    assert "unused" not in whole and whole["steps"] == "12 of 512 (the last 366) tokens, 4 micro-batches each"
    assert "of the order" in plan.plan(config(made, ""))["tokens"]


def test_repeats_and_omissions_are_told(made):
    about = orders.load_order(made[1] / "tilt.npy").manifest
    told = plan.plan(config(made, "tilt.npy"))
    assert f"at most {about['most_repeats']}; {about['omitted_segments']:,} segments are never used" in told["epochs"]
    assert float(told["epochs"].split()[0]) > 1


def test_time_is_told_from_the_newest_run_of_the_same_model(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = config(made, "once.npy")
    assert plan.plan(cfg)["time"].startswith("unknown: no run of this model under runs/")
    tables = cfg.model_dump(mode="json")
    hardware = dict(hardware=dict(device="abacus"), processes=1)
    for name, model, seconds in (("other", dict(num_layers=9), 1.0), ("same", {}, 4.0)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        first = dict(kind="run", config=tables | dict(model=tables["model"] | model), **hardware)
        rows = [first, dict(step=2, tokens=1024, time_s=seconds)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "metrics.jsonl").write_text("{")
    assert "at 256 tokens/s (measured by runs/same on abacus, 1 process(es))" in plan.plan(cfg)["time"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(steps=99), "run.steps 99 of 512 tokens need 50688 tokens, the order holds"),
        (dict(order="none.npy"), "no such order"),
    ],
)
def test_what_the_trainer_would_refuse_is_refused(made, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        plan.plan(config(made, changes.pop("order", "once.npy"), **changes))


def test_ranges_are_shown_as_ranges():
    assert plan.several(np.array([4, 4, 4])) == "4"
    assert plan.several(np.array([4, 4, 3])) == "4 (the last 3)"
    assert plan.several(np.array([2, 4, 4])) == "2 to 4"
    assert plan.several(np.array([7])) == "7"
