"""Previews show what an order or a schedule does: pictures against the arrays they are drawn from, offline pages."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from curriculum.bins import Layout
from curriculum.config import Optim
from curriculum.order import GRID, exact, save_order
from curriculum.schedules import FAMILIES, parse
from data.cli import InputError, command
from scripts import preview


@pytest.fixture
def make_order(tmp_path):
    """An order of 400 segments with the manifest that curriculum.order writes; some of its entries may be given."""

    def make(**entries) -> Path:
        composition_CB = preview.stretches(parse("increasing").weights((np.arange(GRID) + 0.5) / GRID, 8))
        manifest = dict(
            scores=dict(folder="scores", id="0" * 12, segments_sha256="0" * 64),
            measure="entropy",
            schedule="increasing(sigma=0.08)",
            bins=8,
            seed=0,
            multiset="exact",
            epochs=1,
            budget_tokens=0,
            subset_seed=0,
            num_segments=400,
            num_tokens=8000,
            corpus_tokens=16000,
            bin_tokens=[1000] * 8,
            schedule_error=1e-10,
            largest_deviation_tokens=31.5,
            batch_distance=dict(mean=0.125, largest=0.5),
            composition=composition_CB.tolist(),
            rank_by_progress=(composition_CB @ preview.middle_ranks(8)).tolist(),
        )
        save_order(tmp_path / "up-0.npy", np.arange(400), manifest | entries)
        return tmp_path / "up-0.npy"

    return make


@pytest.fixture
def order(make_order):
    return make_order()


def figures(page: str) -> list[dict]:
    return [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]


# -- In the terminal


def test_an_order_is_drawn_with_its_numbers(order, capsys):
    preview.main(order)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{order}: increasing(sigma=0.08) over 8 bins of entropy, seed 0"
    picture = lines[3:11]
    dark = [line.index("█") for line in picture]
    assert dark == sorted(dark, reverse=True) and dark[-1] < 6  # the highest bin, on top, comes last
    assert "  segments           400" in lines
    assert "  tokens             8,000; of 16,000 scored 50.0% are used, each once" in lines
    assert "  deviation          32 tokens of any bin from its schedule, at most" in lines
    assert any(line.startswith("  mean rank          0.500, LR-weighted 0.36") for line in lines)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (dict(epochs=4), "8,000; of 16,000 scored 12.5% are used, each 4 times"),
        (
            dict(multiset="reweight", coverage=0.3, omitted_segments=250, repeated_segments=1000),
            "8,000; of 16,000 scored 30.0% are used, a selection: 250 segments never, 1,000 repeated",
        ),
    ],
)
def test_repeats_and_selections_are_named_as_such(entries, said, make_order, capsys):
    preview.main(make_order(**entries))
    assert f"  tokens             {said}" in capsys.readouterr().out.splitlines()


def test_a_schedule_is_drawn_as_wished_and_as_an_exact_order(capsys):
    preview.main(schedule="pacing(2, 0.1)", bins=8)
    lines = capsys.readouterr().out.splitlines()
    wish, exact = ([line[2 + i : 36 + i] for line in lines[3:11]] for i in (0, 38))
    assert lines[2].split() == "as wished as an exact order".split()
    assert wish != exact
    assert wish[-1].count("░") + wish[-1].count("▒") > 9  # the lowest bin is wished for to the end
    assert len(exact[-1].rstrip()) < 30  # and used up before it
    assert max(map(len, lines)) <= 120


def test_what_no_exact_order_can_give_is_still_drawn_with_the_reason(capsys):
    preview.main(schedule="pacing(0.5, 0.1)", bins=8)
    out = capsys.readouterr().out
    assert "█" in out and "as an exact order  impossible: the schedule cannot use every segment exactly once" in out
    assert "wished of a bin    0.05 to 3.11 times what it holds" in out


def test_all_families_are_in_the_gallery(capsys):
    shown = [text for texts in preview.GALLERY.values() for text in texts]
    names = {name for text in shown for name in re.findall(r"[a-z_]+", text)}
    assert set(FAMILIES) - names == {"custom"}  # needs a file of yours
    preview.main(all=True, bins=5)
    out = capsys.readouterr().out
    assert [line[2:] for line in out.splitlines() if re.match(r"  \w", line)] == shown
    assert "impossible" not in out


@pytest.mark.parametrize("num_bins", [1, 3, 40])
def test_the_text_picture_is_the_array(num_bins):
    """A bin alone at each moment is black where it is and blank elsewhere."""
    at_C = np.arange(72) * num_bins // 72
    lines = preview.draw(np.eye(num_bins)[at_C])
    rows = min(16, num_bins)
    assert len(lines) == rows + 1 and {len(line) for line in lines} == {72}
    for column, b in enumerate(at_C):
        row = max(r for r in range(rows) if r * num_bins // rows <= b)
        expected = ["█" if r == row else " " for r in reversed(range(rows))]
        if num_bins > 1:
            assert [line[column] for line in lines[:rows]] == expected
    if num_bins == 1:
        assert set(lines[0]) == {"▒"}  # an even share


def test_stretches_are_means_and_keep_every_token():
    weights_GB = np.random.default_rng(0).random((GRID, 3))
    stretch_CB = preview.stretches(weights_GB)
    assert stretch_CB.shape == (100, 3)
    sizes = np.diff(np.arange(101) * GRID // 100)
    np.testing.assert_allclose(sizes @ stretch_CB, weights_GB.sum(0))
    np.testing.assert_allclose(stretch_CB[0], weights_GB[: sizes[0]].mean(0))


def test_leaning_is_weighted_by_the_learning_rate():
    rank_C = np.linspace(0, 1, 1001)
    constant, falling = Optim(cooldown_frac=0.0), Optim(cooldown_frac=1.0, floor=0.0)
    assert preview.leaning(rank_C, constant) == "LR-weighted 0.500, last 5 % 0.975"
    assert preview.leaning(rank_C, falling) == "LR-weighted 0.333, last 5 % 0.975"  # of weight 1 - t, the mean of t


# -- On a page


def test_a_page_holds_what_is_drawn_and_asks_no_network(tmp_path):
    preview.main(schedule="fold(3)", bins=6, html=tmp_path / "fold.html")
    page = (tmp_path / "fold.html").read_text()
    assert "default-src 'none'" in page
    without_plotly = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)=", without_plotly)
    (figure,) = figures(page)
    weights_GB = parse("fold(3)").weights((np.arange(GRID) + 0.5) / GRID, 6)
    exact_GB, _ = exact(parse("fold(3)"), Layout(6))
    for trace, drawn_GB in zip(figure["data"], (weights_GB, exact_GB * GRID), strict=True):
        np.testing.assert_allclose(np.array(trace["z"]), 6 * preview.stretches(drawn_GB).T, rtol=6e-3, atol=1e-9)
        assert trace["zmax"] == preview.TOP
    assert [label["text"] for label in figure["layout"]["annotations"]] == [preview.WISH, preview.EXACT]


def test_all_families_fit_on_one_page(tmp_path, capsys):
    preview.main(all=True, bins=4, html=tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text()
    shown = [text for texts in preview.GALLERY.values() for text in texts]
    assert len(figures(page)) == len(shown)
    assert re.findall(r'<figure class="plot"><h3>(.*?)</h3>', page) == shown
    assert capsys.readouterr().out == f"{tmp_path / 'all.html'}: {len(shown)} pictures\n"


def test_an_order_has_a_page_too(order, tmp_path):
    preview.main(order, html=tmp_path / "order.html")
    (figure,) = figures((tmp_path / "order.html").read_text())
    composition_CB = np.array(json.loads(order.with_suffix(".json").read_text())["composition"])
    np.testing.assert_allclose(np.array(figure["data"][0]["z"]), 8 * composition_CB.T, rtol=6e-3, atol=1e-9)


# -- Bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "expected one of: an order file, --schedule EXPRESSION, --all"),
        (dict(schedule="fold", all=True), "expected one of: an order file, --schedule EXPRESSION, --all"),
        (dict(schedule="nosuch"), "unknown name 'nosuch'; known are random, "),
        (dict(schedule="fold", bins=0), "--bins 0: expected 1 to 1024"),
        (dict(schedule="fold", bins=1025), "--bins 1025: expected 1 to 1024"),
        (dict(schedule="fold", floor=1.5), "--floor 1.5: expected numbers from 0 to 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        preview.main(**options)


def test_a_folder_is_no_page(tmp_path):
    with pytest.raises(InputError, match="is a folder; name an .html file"):
        preview.main(schedule="fold", html=tmp_path)


def test_the_command_line_takes_either(order, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["preview", str(order)])
    command(preview.main)
    monkeypatch.setattr(sys, "argv", ["preview", "--schedule", "then(fold(2), random)", "--bins", "3"])
    command(preview.main)
    out = capsys.readouterr().out
    assert out.count("progress") >= 3 and "then(fold(2), random)" in out
    monkeypatch.setattr(sys, "argv", ["preview", "--schedule", "fold(0)"])
    with pytest.raises(SystemExit) as stopped:
        command(preview.main)
    assert stopped.value.code == 2
    assert "K = 0 is out of range" in capsys.readouterr().err
