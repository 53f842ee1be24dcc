"""The report: whole, offline, honest about n, and never broken by an artifact that is gone."""

import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from curriculum import order, score
from curriculum.compare import SELECTION, Against, Arm, Row, compare
from curriculum.config import Config, Data, Optim
from curriculum.records import Arms, as_compared, find_runs, usable_arms
from curriculum.report import arm_key, assign_looks, average, density, quantiles, render, smooth, verdict
from data.shards import open_corpus, read_shard

BINS = 4
STEPS = 40
SECTIONS = ["result", "curves", "differences", "tokens", "bins", "orders", "measures", "examples", "runs"]
ODD = "<img src=http://evil.example/x.png>&'\"</script>"  # no run can be called so; a metrics file can


def write_run(folder, name, order_path, corpus, seed, level):
    """metrics.jsonl as train_gpt.py writes it, of a run that did not take place."""
    manifest = order.load_order(order_path).manifest
    tokens = manifest["num_tokens"]
    keys = ("recipe", "order_sha256", "multiset_sha256", "measure", "schedule", "bins", "seed", "num_segments")
    identity = dict(digest=f"digest of {name}", name=name, seed=seed, order_sha256=manifest["order_sha256"])
    about = dict(kind="run", name=name, seed=seed, steps=STEPS, val_tokens=1000, parameters=12345, code_sha256="c" * 64)
    about |= dict(identity=identity | dict(segments_sha256="s", val_segments_sha256="v"))
    about |= dict(order={key: manifest[key] for key in keys} | dict(tokens=tokens))
    config = Config(
        data=Data(shards=str(corpus), order=str(order_path), seq_len=64, micro_batch_tokens=1024, batch_tokens=1024),
        optim=Optim(muon_lr=0.02 + 0.01 * (name == "increasing")),
    )
    about |= dict(config=config.model_dump(mode="json"), hardware=dict(device="test"), processes=1)
    rows = [about]
    for step in range(1, STEPS + 1):
        at = dict(step=step, tokens=tokens * step // STEPS, time_s=0.5 * step)
        loss = level + 4 * np.exp(-step / 10)
        rows.append(at | dict(train_nats=loss))
        if step % 10 == 0:
            rows.append(at | dict(val_nats=loss, bin_nats=[None, *(loss + b / 10 for b in range(1, BINS))]))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_corpus):
    """Real scores and orders of a copy of the tiny corpus, and the runs of three arms: 3, 2 and 1 of them."""
    root = tmp_path_factory.mktemp("report")
    corpus, scores = root / "corpus", root / "scores"
    shutil.copytree(tiny_corpus, corpus)
    score.main(str(corpus), reference="none", out=scores, max_len=64)
    arms = [("random", "random", 3, 3.0), ("increasing", "increasing", 2, 2.9), (ODD, "placebo(fold(2))", 1, 3.1)]
    for place, (name, schedule, count, level) in enumerate(arms):
        for seed in range(count):
            path = root / "orders" / f"{place}-{seed}.npy"
            order.main(scores, path, measure="unigram_nll", schedule=schedule, bins=BINS, seed=seed)
            write_run(root / "runs" / f"{place}-{seed}", name, path, corpus, seed, level + 0.01 * seed)
    return root


def page_of(root, problems=(), baseline="random") -> str:
    from plotly.offline import get_plotlyjs

    arms = usable_arms(find_runs([root / "runs"]), baseline)
    arms.problems.extend(problems)
    page = render(arms, compare(as_compared(arms), baseline))
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


class Reader(HTMLParser):
    """Tags with their attributes, the figures' JSON, and the text."""

    VOID = {"meta", "link", "input", "br", "hr", "line", "img"}

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.figures, self.open = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []
        self.text = "".join(text for _, text in self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script" and self.tags[-1][1].get("type") == "application/json":
            assert "<" not in data  # or a name could end the script
            self.figures.append(json.loads(data))
        elif inside not in ("script", "style"):
            self.texts.append((inside, data))


@pytest.fixture(scope="module")
def page(made):
    return page_of(made, ["runs/odd: not finished: left out <b>"])


def test_every_section_is_there_in_order(page):
    read = Reader(page)
    assert [attrs["id"] for tag, attrs in read.tags if tag == "section"] == SECTIONS
    assert [attrs["href"] for tag, attrs in read.tags if tag == "a"] == [f"#{key}" for key in SECTIONS]
    assert "Not shown" not in read.text
    assert "runs/odd: not finished: left out <b>" in read.text


def test_nothing_is_fetched(page):
    read = Reader(page)
    for tag, attrs in read.tags:
        assert tag not in ("link", "iframe", "img", "object", "base")
        for key in ("src", "srcset", "action", "data"):
            assert key not in attrs
    policy = [attrs["content"] for _, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none'") and "http" not in policy[0]
    assert "@import" not in page and "url(" not in page
    assert len(page) < 1_000_000


@pytest.mark.parametrize("baseline", ["random", ODD])
def test_names_are_text_wherever_they_stand(made, baseline):
    page = page_of(made, baseline=baseline)
    read = Reader(page)
    assert ODD in read.text and {tag for tag, _ in read.tags} & {"img"} == set()
    for figure in read.figures:  # plotly reads tags in labels
        assert "<img" not in json.dumps(figure)


def test_plotly_accepts_every_figure(page):
    import plotly.graph_objects as go

    figures = Reader(page).figures
    # Curves, forest, tokens, bins, two of the three bins over training (the first is empty), orders, ranks, measures
    # and their correlations.
    assert len(figures) == 3 + 1 + 2 + 1 + 2 + 3 + 1 + 4 + 1
    for figure in figures:
        go.Figure(figure)  # raises ValueError on an unknown property


def test_bins_are_shown_as_differences_and_an_empty_bin_as_a_gap(page):
    figure = next(f for f in Reader(page).figures if f["layout"]["xaxis"]["title"]["text"] == "bin of unigram_nll")
    lines = {trace["meta"]["arm"]: trace for trace in figure["data"] if trace["mode"] == "lines+markers"}
    assert lines[0]["y"] == [None, 0, 0, 0]
    np.testing.assert_allclose(lines[1]["y"][1:], 2.905 - 3.01, rtol=1e-3)
    assert lines[1]["customdata"][1:] == pytest.approx([2.905 + 4 * np.exp(-4) + b / 10 for b in (1, 2, 3)])


def test_what_belongs_to_an_arm_carries_its_number(page):
    """Rows of the leaderboard and of the runs, checkboxes and order maps: the filter hides them by it."""
    tags = Reader(page).tags
    boxes = [attrs["value"] for tag, attrs in tags if tag == "input" and attrs.get("type") == "checkbox"]
    assert sorted(boxes) == ["0", "1", "2"]
    numbered = {
        kind: [a["data-arm"] for tag, a in tags if tag == kind and "data-arm" in a] for kind in ("tr", "figure")
    }
    assert sorted(numbered["figure"]) == ["0", "1", "2"]
    assert sorted(numbered["tr"]) == sorted([*"012", *"000112", *"012"])  # leaderboard, six runs, settings
    forests = [figure for figure in Reader(page).figures if "rows" in figure["layout"].get("meta", {})]
    for figure in forests:
        assert {trace["meta"]["row"] for trace in figure["data"]} <= set(figure["layout"]["meta"]["rows"]) <= {0, 1, 2}
    assert len(forests) == 3


def test_with_many_arms_the_plots_begin_with_the_best():
    names = ["base", *(f"arm{i}" for i in range(40))]
    few, many = (Reader(arm_key(some, assign_looks(some, "base"))).tags for some in (names[:5], names))
    for tags, checked in ((few, 5), (many, 9)):
        boxes = [attrs for tag, attrs in tags if tag == "input"]
        assert [("checked" in attrs) for attrs in boxes] == [i < checked for i in range(len(boxes))]


def test_tokens_to_the_baselines_loss_are_read_off_each_run(page):
    """Every run falls by the same curve, so only those whose level is below the baseline's mean get there."""
    forests = [f for f in Reader(page).figures if "rows" in f["layout"].get("meta", {})]
    figure = next(f for f in forests if f["layout"]["xaxis"]["title"]["text"] == "training tokens")
    reached = {t["meta"]["row"]: t["x"] for t in figure["data"] if t["meta"]["below"]}
    assert [x is not None for x in reached[0]] == [True, True, False] and None not in reached[1]
    assert reached[2] == [None]


def test_measures_that_sort_alike_correlate(page):
    """Signed in the text, by strength in the colour; of a measure with itself it is 1."""
    (figure,) = [f for f in Reader(page).figures if f["data"][0].get("texttemplate")]
    heat = figure["data"][0]
    assert set(heat["x"]) == {"unigram_nll", "length", "zstd_ratio", "type_token_ratio"}
    for i in range(4):
        assert heat["text"][i][i] == "1.00"
        for j in range(4):
            assert float(heat["text"][i][j].replace("−", "-")) == pytest.approx(heat["z"][i][j], abs=0.006) or (
                heat["text"][i][j].startswith("−")
            )
    assert heat["text"][heat["y"].index("length")][heat["x"].index("type_token_ratio")].startswith("−")


def test_examples_are_the_text_of_the_segments_named(page, made):
    segments = score.read_scores(made / "scores").segments
    paths = open_corpus(made / "corpus", quiet=True).paths
    texts = Reader(page).texts
    labels = [text for tag, text in texts if tag == "p" and "· segment " in text]
    shown = [text for tag, text in texts if tag == "pre"]
    assert len(labels) == len(shown) == 9
    for label, text in zip(labels, shown, strict=True):
        i = int(label.rsplit(" ", 1)[1])
        start, length = segments.start_N[i], segments.length_N[i]
        tokens = read_shard(paths[segments.shard_N[i]])[start : start + length]
        # Tokens of the tiny corpus are bytes; a newline that begins a <pre> is no part of it.
        assert text == "\n" + bytes(t for t in tokens.tolist() if t < 256).decode()
        assert f"{length} token" in label
    assert "entropy" not in "".join(labels) and all("unigram_nll" in label for label in labels)


def test_the_report_is_the_same_twice(page, made):
    assert page_of(made, ["runs/odd: not finished: left out <b>"]) == page


@pytest.mark.parametrize(
    ("gone", "silent", "said"),
    [
        ("orders", {"orders", "measures", "examples"}, "no such order"),
        ("scores", {"measures", "examples"}, "no score table of train shards"),
        ("corpus", {"examples"}, "no such shard or folder of shards"),
        ("corpus/tiny_bytes.tiktoken", {"examples"}, "no such rank file"),
        ("corpus/tiny_train_000001.bin", {"examples"}, "has no shard tiny_train_000001.bin, which was scored"),
        ("orders/0-0.npy", {"orders"}, "random: "),
    ],
)
def test_what_is_gone_is_named_and_the_rest_is_shown(made, gone, silent, said):
    away = made / "away"
    (made / gone).rename(away)
    try:
        parts = page_of(made).split("<section id=")[1:]
    finally:
        away.rename(made / gone)
    assert {part[1:].partition('"')[0] for part in parts if "Not shown: " in part} == silent
    assert all(said in part for part in parts if "Not shown: " in part)
    assert len(parts) == len(SECTIONS)


def test_scores_made_again_are_not_taken_for_those_of_the_order(made):
    (made / "scores").rename(made / "away")
    try:
        score.main(str(made / "corpus"), reference="none", out=made / "scores", max_len=32)
        page = page_of(made)
    finally:
        shutil.rmtree(made / "scores")
        (made / "away").rename(made / "scores")
    assert page.count("the order was made from") == 2  # measures, examples


def test_an_order_made_again_is_not_taken_for_the_one_trained_on(made, tmp_path):
    shutil.copytree(made / "orders", tmp_path / "orders")
    for kind in ("npy", "json"):
        shutil.copy(tmp_path / f"orders/0-1.{kind}", tmp_path / f"orders/0-0.{kind}")
    runs = find_runs([made / "runs"])
    for run in runs:
        run.about["config"]["data"]["order"] = run.about["config"]["data"]["order"].replace(str(made), str(tmp_path))
    arms = usable_arms(runs, "random")
    assert "it is not the order of" in render(arms, compare(as_compared(arms), "random"))


def test_a_single_arm_and_runs_in_stock_order_make_a_report(made):
    run = find_runs([made / "runs/0-0"])[0]
    run.about["config"]["data"]["order"] = ""
    for row in run.rows:
        row.pop("bin_nats", None)
    page = render(Arms("random", {"random": [run]}, []), compare({"random": Arm([[3.0]], "random")}, "random"))
    assert "trained in stock order" in page and "logged no loss by bin" in page
    assert "Nothing is compared: random (n&nbsp;=&nbsp;1) is the only arm." in page


def row(name, n=3, difference=None, half=0.01, p=None, **more):
    """A row of an arm, or of the baseline where there is no difference; it beats the baseline below 5 %."""
    mean = 3.0 + (difference or 0.0)
    if difference is None:
        return Row(name, n, n, mean, np.array([mean]), is_baseline=True, **more)
    low, high = (None, None) if p is None else (difference - half, difference + half)
    tests = dict(baseline=Against("base", difference, low, high, p, p))
    beaten = ("baseline",) if p is not None and p < 0.05 else ()
    return Row(name, n, n, mean, np.array([mean]), tests=tests, beaten=beaten, **more)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            [row("a", 4, -0.02, p=0.01), row("b", 2, 0.1, p=1.0)],
            "1 of 2 tested arms beat base (n = 3) at Holm p < 0.05",
        ),
        ([row("a", 4, -0.02, p=0.01)], "a by 0.0200 nats (n = 4, p = 0.01); no win, which takes beating a placebo"),
        ([row("a", 4, -0.02, p=0.01, win=True)], "; a win, against placebo and length as well: a."),
        (
            [row("a", 4, -0.02, p=0.01), row("b", 4, -0.2, p=0.01, track=SELECTION)],
            "The one tested arm beats base (n = 3)",
        ),
        ([row("b", 4, -0.2, p=0.01, track=SELECTION)], "is the only arm that was trained on these tokens."),
        (
            [row("a", 2, -0.02, 0.5, 0.4), row("b", 4, -0.2, track=SELECTION)],
            "; 1 arm of other tokens (selection) stands",
        ),
        ([row("a", 4, -0.02, p=0.01), row("b", 2, 0.1, p=1.0)], "; worse by the whole interval: b."),
        ([row("a", 2, -0.02, 0.5, 0.4)], "The one tested arm is not shown to beat base (n = 2 against 3)"),
        ([row("a", 2, -0.02, 0.5, 0.4)], "the smallest Holm p is 0.4, and intervals reach up to ± 0.5 nats."),
        (
            [row("a", 2, -0.02, 0.5, 0.4), row("b", 5, 0.0, p=0.5)],
            "None of 2 tested arms is shown to beat base (n = 2 to",
        ),
        ([row("a", 2, -0.02, 0.5, 0.4), row("b", 1, -1.0)], "; 1 more arm could not be tested."),
        ([row("a", 1, -1.0)], "No test could be made of 1 arm (n = 1) against base (n = 3)"),
    ],
)
def test_the_verdict_says_what_was_shown_and_with_how_many_runs(others, said):
    assert said in verdict([row("base"), *others], "base")


def test_a_curve_is_the_mean_over_runs_with_the_spread_they_allow():
    x = np.array([1.0, 2.0])
    one, two, three = (np.array([v, 2 * v]) for v in (1.0, 2.0, 6.0))
    alone = average([(x, one)])
    assert alone.low_P is None and alone.mean_P.tolist() == [1, 2]
    pair = average([(x, one), (x, two)])
    assert (pair.low_P.tolist(), pair.mean_P.tolist(), pair.high_P.tolist()) == ([1, 2], [1.5, 3], [2, 4])
    many = average([(x, one), (x, two), (x, three)])
    np.testing.assert_allclose(many.high_P - many.mean_P, np.std([one, two, three], axis=0, ddof=1))


def test_runs_validated_at_other_steps_are_read_off_between():
    coarse, fine = np.array([2.0, 4.0]), np.array([1.0, 2.0, 3.0, 4.0])
    curve = average([(fine, 10 * fine), (coarse, 10 * coarse)])
    assert curve.x_P.tolist() == [2, 4] and curve.mean_P.tolist() == [20, 40]


def test_long_curves_are_thinned_and_keep_their_ends():
    x = np.arange(1.0, 5001)
    curve = average([(x, x)])
    assert len(curve.x_P) == 200 and (curve.x_P[0], curve.x_P[-1]) == (1, 5000)


def test_smoothing_averages_within_stretches():
    tokens = np.arange(1, 1001.0)
    x, y = smooth(tokens, tokens**2, 1000)
    assert len(x) == 100
    np.testing.assert_allclose([x[3], y[3]], [np.mean(tokens[29:39]), np.mean(tokens[29:39] ** 2)])


def test_settings_that_differ_are_named_and_no_others(page):
    differing = Reader(page).text.split("What differs between arms")[1]
    assert "optim.muon_lr" in differing and "order.schedule" in differing
    assert "optim.head_lr" not in differing and "data.order" not in differing and "data.shards" not in differing


@pytest.mark.parametrize("num_bins", [1, 4, 32, 33, 100])
def test_an_even_order_has_density_one_however_bins_are_merged(num_bins):
    share_CB = np.full((5, num_bins), 1 / num_bins)
    share_CB[2] = 0.0  # no token fell into this stretch
    found_CB = density(share_CB)
    assert found_CB.shape == (5, min(num_bins, 32)) and np.isnan(found_CB[2]).all()
    np.testing.assert_allclose(np.delete(found_CB, 2, 0), 1)


def test_quantiles_weigh_segments_by_their_tokens():
    values, weights = np.array([5.0, 1.0, 3.0]), np.array([1, 1, 98])
    assert quantiles(values, weights, (0.005, 0.5, 0.995)) == [1, 3, 5]


def test_looks_are_distinct_and_do_not_depend_on_results():
    looks = assign_looks([f"arm{i}" for i in range(24)] + ["base"], "base")
    assert looks["base"].slot == 0 and looks["base"].color == "var(--base)"
    assert len({(look.color, look.group) for look in looks.values()}) == 25
