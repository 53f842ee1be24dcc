"""The transfer probe: its verdict on simulated matrices, and branches of a real run."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from curriculum import order, score
from curriculum.config import Config, Run
from curriculum.probe import best_mixture, contrast, gain, judge, means, on_simplex, p_constant
from curriculum.records import read_run
from data.cli import InputError
from scripts import probe, sweep

# --- statistics -------------------------------------------------------------------------------------------------------


def formula(mixture_B: np.ndarray, drop_A: np.ndarray) -> float:
    """The head of curriculum/probe.py, written out."""
    num_bins = len(mixture_B)
    curvature = drop_A[-1] - drop_A[:-1].mean()
    return mixture_B @ drop_A[:-1] + curvature * (1 - (mixture_B**2).sum()) / (1 - 1 / num_bins)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_mixture_is_the_best_of_a_fine_grid(seed):
    rng = np.random.default_rng(seed)
    drop_A = rng.normal(1, 0.3, 4)
    if seed % 2:
        drop_A[-1] = drop_A[:-1].mean() + rng.uniform(0.1, 1)  # variety is worth something
    ticks = np.linspace(0, 1, 101)
    grid = np.array([(a, b, 1 - a - b) for a in ticks for b in ticks if a + b <= 1 + 1e-12])
    found = best_mixture(drop_A)
    assert found.sum() == pytest.approx(1) and found.min() >= 0
    best = max(formula(mixture, drop_A) for mixture in grid)
    assert best - 1e-12 <= formula(found, drop_A) <= best + 1e-3


def test_the_formula_says_what_was_measured_at_every_bin_and_at_the_mix():
    drop_A = np.array([0.3, 0.1, 0.2, 0.5, 0.4])
    for mixture_B in [*np.eye(4), np.full(4, 0.25), np.array([0.7, 0.1, 0.1, 0.1])]:
        assert contrast(mixture_B) @ drop_A == pytest.approx(formula(mixture_B, drop_A) - drop_A[-1])
    assert contrast(np.full(4, 0.25)) @ drop_A == pytest.approx(0)


@pytest.mark.parametrize("seed", range(10))
def test_nothing_on_the_simplex_is_nearer(seed):
    rng = np.random.default_rng(seed)
    x_B = rng.normal(0, 1, 5)
    found = on_simplex(x_B)
    assert found.sum() == pytest.approx(1) and found.min() >= 0
    others = rng.dirichlet(np.ones(5), 2000)
    assert ((others - x_B) ** 2).sum(1).min() >= ((found - x_B) ** 2).sum() - 1e-12


def test_errors_are_those_of_means():
    rng = np.random.default_rng(0)
    drop_RAV = rng.normal(1, 0.1, (6, 4, 3))
    mean_AV, error_AV = means(drop_RAV)
    np.testing.assert_allclose(mean_AV[2, 1], drop_RAV[:, 2, 1].mean())
    np.testing.assert_allclose(error_AV[2, 1], drop_RAV[:, 2, 1].std(ddof=1) / 6**0.5)


def test_a_single_bins_gain_has_welchs_interval():
    from scipy import stats

    rng = np.random.default_rng(0)
    drop_RA = rng.normal([1.0, 1.2, 1.1], [0.1, 0.3, 0.05], (6, 3))
    found = gain(np.array([0.0, 1.0]), drop_RA, drop_RA.var(0, ddof=1), 6)
    welch = stats.ttest_ind(drop_RA[:, 1], drop_RA[:, 2], equal_var=False).confidence_interval(0.9)
    np.testing.assert_allclose([found.low, found.high], welch)


def simulate(true_A: np.ndarray, sd: float, seeds: int = 4, times: int = 1000) -> list:
    rng = np.random.default_rng(0)
    return [judge(true_A + sd * rng.standard_normal((seeds, len(true_A)))) for _ in range(times)]


def share(verdicts: list, answer: str) -> float:
    return sum(verdict.answer == answer for verdict in verdicts) / len(verdicts)


SLACK = 2.6 * (0.05 * 0.95 / 1000) ** 0.5  # of a share of 5 % in 1,000 simulations


@pytest.mark.parametrize("sd", [0.02, 0.1])
@pytest.mark.parametrize("mix", [1.0, 1.2])
def test_yes_is_rarely_said_where_no_mixture_is_better(mix, sd):
    verdicts = simulate(np.array([1.0, 1.0, 1.0, 1.0, mix]), sd)
    assert share(verdicts, "yes") <= 0.05 + SLACK
    if sd == 0.02 or mix > 1:  # precise enough, or variety plainly better than any bin
        assert share(verdicts, "no") > 0.6


@pytest.mark.parametrize("spread", [0.1, 0.4])
def test_a_real_gain_is_found_and_hardly_ever_denied(spread):
    true_A = np.append(1 + spread * np.linspace(-1, 1, 4), 1.1)
    best = contrast(best_mixture(true_A)) @ true_A
    verdicts = simulate(true_A, 0.02)
    assert share(verdicts, "yes") > 0.9
    assert np.mean([verdict.flattered.high < best for verdict in verdicts]) <= 0.05 + SLACK
    if best > 0.05 * 1.1:
        assert share(verdicts, "no") <= 0.05 + SLACK
    # What was chosen on half of the seeds is judged without flattery.
    errors = [v.judged.nats - contrast(v.judged.mixture_B) @ true_A for v in verdicts]
    assert abs(np.mean(errors)) < 4 * np.std(errors) / len(errors) ** 0.5
    assert np.mean([verdict.flattered.nats for verdict in verdicts]) > best - 0.01


def test_a_noisy_probe_says_neither():
    verdicts = simulate(np.append(1 + 0.1 * np.linspace(-1, 1, 4), 1.1), 0.3, times=200)
    assert share(verdicts, "unclear") > 0.8


def test_worths_that_stay_the_same_are_called_different_once_in_twenty():
    rng = np.random.default_rng(0)
    worth_A, level_P, sd_P = np.array([0.0, 0.1, 0.3, 0.2, 0.2]), [2.0, 1.0, 0.5], [0.2, 0.1, 0.05]

    def p(change: float) -> float:
        tilt_A = change * np.array([-1, 0, 0, 1, 0])
        return p_constant(
            [
                level + worth_A + i * tilt_A + sd * rng.standard_normal((4, 5))
                for i, (level, sd) in enumerate(zip(level_P, sd_P, strict=True))
            ]
        )

    rate = np.mean([p(0.0) < 0.05 for _ in range(3000)])
    assert 0.04 < rate < 0.07  # 0.056 in 40,000 simulations of these spreads
    assert np.mean([p(0.4) < 0.05 for _ in range(200)]) > 0.8


# --- branches ---------------------------------------------------------------------------------------------------------

CONFIG = """
[run]
checkpoint_seconds = 1e9
save_at = [0.25, 0.5, 1]
[data]
shards = "{corpus}"
seq_len = 32
batch_tokens = 256
micro_batch_tokens = 128
val_tokens = 1000
val_every = 4
[model]
num_layers = 1
model_dim = 16
head_dim = 8
num_value_embeds = 0
[optim]
warmup_frac = 0.125
cooldown_frac = 0.25
momentum_warmup_frac = 0.125
"""
CHECKPOINTS = [4, 8]  # of 16 steps; at the third the learning rate is 0


@pytest.fixture(scope="module")
def parent(tiny_corpus, tmp_path_factory) -> Path:
    """A folder with scores of windows, an order of 4,096 of their 6,000 tokens, and a run on it: 16 steps of 8 windows.

    Windows fill batches exactly: a branch on what the parent did next repeats the parent's own steps.
    """
    import train_gpt
    from curriculum.config import parse_args

    folder = tmp_path_factory.mktemp("probe")
    score.main(str(tiny_corpus), "none", folder / "scores", max_len=32, unit="window")
    order.main(folder / "scores", folder / "order.npy", measure="unigram_nll", bins=4, tokens=4096, seed=5)
    (folder / "config.toml").write_text(CONFIG.format(corpus=tiny_corpus))
    options = ["--data.order", str(folder / "order.npy"), "--run.out_dir", str(folder / "run")]
    train_gpt.train(parse_args([str(folder / "config.toml"), *options]), train_gpt.World())
    return folder


def test_branches_draw_fresh_segments_each_its_own(parent):
    opened = probe.open_parent(parent / "run")
    assert [point.step for point in opened.points] == CHECKPOINTS
    out = parent / "layout"
    layout = probe.lay_out(out, parent / "scores", "unigram_nll", 2, opened)
    for point in opened.points:
        pieces = probe.draw(point, opened, layout, 256, 4)
        assert pieces.keys() == {(arm, seed) for arm in ("bin0", "bin1", "mix") for seed in range(4)}
        used = np.concatenate(list(pieces.values()))
        seen = opened.ids_N[: point.step * 8]  # 8 windows of 32 tokens a step
        assert len(np.unique(used)) == len(used) and not np.isin(used, seen).any()
        for (arm, _), ids in pieces.items():
            tokens = layout.length_N[ids].sum()
            assert 256 <= tokens < 256 + 2 * 32
            of_bin = np.bincount(layout.bin_N[ids], weights=layout.length_N[ids], minlength=2)
            if arm == "mix":
                assert abs(of_bin[0] - of_bin[1]) <= 32
            else:
                assert of_bin[int(arm[3:])] == tokens
    few, more = (probe.draw(opened.points[0], opened, layout, 256, seeds) for seeds in (4, 5))
    assert all(np.array_equal(more[key], ids) for key, ids in few.items())
    with pytest.raises(InputError, match="take fewer --seeds, --tokens or --bins"):
        probe.draw(opened.points[0], opened, layout, 1024, 4)


def test_schedules_stand_still_where_the_checkpoint_was_kept():
    tables = dict(
        data=dict(batch_schedule=(0.5, 1.0), batch_tokens=1024, micro_batch_tokens=128, seq_len=64),
        model=dict(window=100, window_schedule=(0.3, 1.0), mtp_weights=(0.5,)),
        optim=dict(warmup_frac=0.5, cooldown_frac=0.2, momentum_warmup_frac=0.5, muon_lr=0.1, average_frac=0.5),
    )
    cfg = Config.model_validate(tables)
    if "init_from" not in Run.model_fields:
        pytest.skip("the trainer cannot branch yet")
    found = probe.branch_config(cfg, probe.Point(Path("step5.pt"), 5, 0.25, 1280), 1200)
    assert (found.data.batch_tokens, found.run.steps) == (512, 2)
    assert found.optim.muon_lr == pytest.approx(0.1 * cfg.optim.lr_scale(0.25) * 0.5**0.5)
    assert {found.optim.lr_scale(t) for t in (0, 0.5, 1)} == {1.0}
    assert {found.optim.momentum(t) for t in (0, 0.5, 1)} == {cfg.optim.momentum(0.25)}
    assert (found.model.window, found.model.mtp_weights, found.optim.average_frac) == (30, (), 0)
    with pytest.raises(InputError, match="less than one batch of 512 tokens"):
        probe.branch_config(cfg, probe.Point(Path("step5.pt"), 5, 0.25, 1280), 500)


@pytest.mark.skipif("init_from" not in Run.model_fields, reason="the trainer cannot branch yet")
def test_a_branch_on_what_the_parent_did_next_repeats_its_steps(parent):
    """From step 8 to 12 the parent's learning rates and momentum stand still, as the branch's do."""
    import train_gpt

    opened = probe.open_parent(parent / "run")
    layout = probe.lay_out(parent / "repeat", parent / "scores", "unigram_nll", 2, opened)
    point = opened.points[CHECKPOINTS.index(8)]
    cfg = probe.branch_config(opened.cfg, point, 4 * 256)
    path = parent / "repeat" / "next.npy"
    assert (opened.start_N[8 * 8], opened.start_N[12 * 8]) == (8 * 256, 12 * 256), "choose another order seed"
    probe.write_order(path, opened.ids_N[8 * 8 : 12 * 8], layout, dict(schedule="next"))
    tables = dict(
        data=cfg.data.model_copy(update=dict(order=str(path))),
        run=cfg.run.model_copy(update=dict(out_dir=str(parent / "repeat" / "run"))),
    )
    train_gpt.train(cfg.model_copy(update=tables), train_gpt.World())
    theirs = {row["step"]: row["val_nats"] for row in read_run(parent / "run").rows if "val_nats" in row}
    mine = {row["step"]: row["val_nats"] for row in read_run(parent / "repeat" / "run").rows if "val_nats" in row}
    assert mine == {0: theirs[8], 4: theirs[12]}


@pytest.mark.skipif("init_from" not in Run.model_fields, reason="the trainer cannot branch yet")
def test_the_whole_probe_stopped_and_continued(parent, tmp_path, monkeypatch, capsys):
    """Branches run in this process, by the command they would be started with."""
    import train_gpt
    from curriculum.config import parse_args

    begun = []

    class Here:
        """Stands for a process that has ended."""

        def __init__(self, line, environment, log):
            begun.append(line)
            if len(begun) == 3:
                raise KeyboardInterrupt
            train_gpt.train(parse_args(line[len(sweep.TRAINER) + 1 :]), train_gpt.World())

        def poll(self):
            return 0

        terminate = wait = poll

    monkeypatch.setattr(sweep, "launch", Here)
    options = dict(scores=parent / "scores", measure="unigram_nll", bins=2, tokens=256, out=tmp_path / "probe")
    with pytest.raises(KeyboardInterrupt):
        probe.main(parent / "run", **options)
    probe.main(parent / "run", **options)
    assert len(begun) == 3 + 2 * 3 * 4 - 2
    said = capsys.readouterr().out
    assert "24 branches, 22 to go" in said and said.count("+-") > 2 * 3 * 3
    told = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert [point["step"] for point in told["points"]] == CHECKPOINTS and 0 <= told["p_constant"] <= 1
    for point in told["points"]:
        assert np.shape(point["G"]) == np.shape(point["G_error"]) == (2, 3)
        assert np.shape(point["drop_by_seed"]) == (4, 3) and point["answer"] in ("yes", "no", "unclear")
    rows = read_run(tmp_path / "probe" / "step4-bin1" / "seed2").rows
    assert rows[0]["step"] == 0
    drop = rows[0]["val_nats"] - rows[-1]["val_nats"]
    assert told["points"][0]["drop_by_seed"][2][1] == pytest.approx(drop)
    with pytest.raises(InputError, match="holds a probe of another run, measure, bins or tokens"):
        probe.main(parent / "run", **options | dict(tokens=512))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(bins=1), "--bins 1"),
        (dict(seeds=3), "--seeds 3"),
        (dict(least=0.0), "--least 0"),
        (dict(gpus=(0, 1, 2), gpus_per_run=2), "not a multiple"),
    ],
)
def test_a_mistake_is_one_sentence(parent, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        probe.main(parent / "run", scores=parent / "scores", out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_branched_from_are_refused(parent, tmp_path):
    kept = tmp_path / "none-kept"
    kept.mkdir()
    (kept / "config.json").write_text((parent / "run" / "config.json").read_text())
    with pytest.raises(InputError, match="no kept checkpoint before its end"):
        probe.main(kept, scores=parent / "scores")
    with pytest.raises(InputError, match="config.json: no such file"):
        probe.main(tmp_path / "nowhere", scores=parent / "scores")


def test_help_needs_nothing_heavy():
    line = ["-c", "import sys, scripts.probe, scripts.sweep; print('torch' in sys.modules or 'scipy' in sys.modules)"]
    done = subprocess.run([sweep.sys.executable, *line], capture_output=True, text=True, cwd=sweep.ROOT, check=True)
    assert done.stdout.strip() == "False"
