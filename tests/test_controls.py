"""Controls share the order's tokens and differ from it in the one thing they control for."""

import numpy as np
import pytest
from scipy import stats

from curriculum import score
from curriculum.order import load_order
from curriculum.order import main as make_order
from data.cli import InputError
from scripts import controls


@pytest.fixture(scope="module")
def scores(tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    score.main(str(tiny_corpus), "none", folder, max_len=64)
    return folder


def test_every_control_is_over_the_same_tokens_and_different(scores, tmp_path):
    path = tmp_path / "up.npy"
    make_order(scores, path, measure="unigram_nll", schedule="increasing", bins=4, tokens=4000, seed=3, epochs=2)
    controls.main(path)
    order = load_order(path)
    made = {name: load_order(tmp_path / f"up-{name}.npy") for name in controls.CONTROLS}
    for name, control in made.items():
        assert control.manifest["multiset_sha256"] == order.manifest["multiset_sha256"], name
        assert sorted(control.ids_N.tolist()) == sorted(order.ids_N.tolist())
        assert control.manifest["seed"] == 3
    assert len({control.manifest["order_sha256"] for control in made.values()} | {order.manifest["order_sha256"]}) == 6
    table = score.read_scores(scores)

    def trend(control, column):
        return stats.spearmanr(np.arange(len(control.ids_N)), table.columns[column][control.ids_N]).statistic

    assert trend(order, "unigram_nll") > 0.8 and trend(made["reverse"], "unigram_nll") < -0.8
    assert trend(made["length"], "length") > 0.8
    assert all(abs(trend(made[name], "unigram_nll")) < 0.4 for name in ("random", "placebo"))
    assert made["stock"].ids_N.tolist() == np.tile(np.unique(order.ids_N), 2).tolist()


def test_an_order_is_not_written_as_its_own_control(scores, tmp_path, capsys):
    make_order(scores, tmp_path / "r.npy", measure="length", schedule="random", bins=4)
    controls.main(tmp_path / "r.npy", seed=9, only=("random", "reverse", "length", "placebo"))
    assert capsys.readouterr().out.count("its own") == 3
    assert sorted(p.name for p in tmp_path.glob("r-*.npy") if "val" not in p.name) == ["r-placebo.npy"]
    assert load_order(tmp_path / "r-placebo.npy").manifest["seed"] == 9


def test_a_grid_is_controlled_by_as_many_bins_of_length(scores, tmp_path):
    make_order(scores, tmp_path / "g.npy", measure="unigram_nll x length", bins=3, second_bins=2)
    controls.main(tmp_path / "g.npy", only=("length",))
    assert load_order(tmp_path / "g-length.npy").manifest["bins"] == 6


def test_what_has_no_controls_is_refused(scores, tmp_path):
    make_order(scores, tmp_path / "w.npy", measure="length", schedule="tilt", bins=4, multiset="reweight", tokens=3000)
    make_order(scores, tmp_path / "s.npy", measure="length", schedule="stock", bins=4)
    make_order(scores, tmp_path / "r.npy", measure="length", bins=4)
    for options, sentence in (
        (dict(order=tmp_path / "w.npy"), "selects its tokens"),
        (dict(order=tmp_path / "s.npy"), "is a control itself"),
        (dict(order=tmp_path / "r.npy", only=("chance",)), "--only chance: expected some of random, reverse"),
        (dict(order=tmp_path / "no.npy"), "no such order"),
        (dict(order=tmp_path / "r.npy", scores=tmp_path), "no score table of train shards there"),
    ):
        with pytest.raises(InputError, match=sentence):
            controls.main(**options)
