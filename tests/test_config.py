"""A config says what was asked for, or one sentence; its digest names the arm and nothing else."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.config import Config, Optim, Run, load, parse_args, stage
from data.cli import InputError


@pytest.fixture
def toml(tmp_path):
    """Write a TOML file below a temporary folder; returns its path."""

    def write(text: str, name: str = "config.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


# -- Reading


def test_what_is_not_said_is_the_default_and_what_is_said_is_kept(toml):
    config = load(toml('[run]\nname = "a"\nsave_at = [0.5, 1]\n[optim]\nmuon_lr = 0.5\n[data]\nunit = "window"\n'))
    assert (config.run.name, config.run.save_at, config.optim.muon_lr, config.data.unit) == (
        "a",
        (0.5, 1),
        0.5,
        "window",
    )
    assert config.model == Config().model
    assert load(toml("")) == Config()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("speed = 1", "unknown setting speed; known are run, data, model, optim"),
        ("[nosuch]\na = 1", "unknown setting nosuch; known are run, data, model, optim"),
        ("[run]\nstep = 4", "unknown setting run.step; known are name, seed, num_seeds, steps"),
        ("run = 5", "run = 5: input should be a valid dictionary"),
        ("[run]\nsteps = 40.5", "run.steps = 40.5: input should be a valid integer"),
        ('[run]\nsteps = "many"', "run.steps = 'many': input should be a valid integer"),
        ("[run]\nseed = -1", "run.seed = -1: input should be greater than or equal to 0"),
        ('[run]\nname = "a b"', "run.name = 'a b': string should match pattern"),
        ('[run]\nname = "../up"', "run.name = '../up': string should match pattern"),
        ("[run]\nsave_at = 0.5", "run.save_at = 0.5: input should be a valid tuple"),
        ('[data]\nunit = "line"', "data.unit = 'line': input should be 'document' or 'window'"),
        ("[optim]\nmuon_lr = nan", "optim.muon_lr = nan: input should be a finite number"),
        ("[optim]\nmuon_lr = 0", "optim.muon_lr = 0: input should be greater than 0"),
        ("[run]\nseed = -1\n[data]\nseq_len = 1", "run.seed = -1: .*; data.seq_len = 1: "),
        ("[run", "not TOML"),
        ("[run]\nname = 'a'\n[run]\nseed = 1", "not TOML"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(toml, text, sentence):
    path = toml(text)
    with pytest.raises(InputError, match=sentence) as refusal:
        load(path)
    assert str(refusal.value).startswith(f"{path}: ")


IMPOSSIBLE = {
    "[data]\nbatch_tokens = 100000\nmicro_batch_tokens = 65536": "data.batch_tokens 100000 is not a multiple of "
    "data.micro_batch_tokens 65536",
    "[data]\nmicro_batch_tokens = 1024\nseq_len = 2048": "data.micro_batch_tokens 1024 is less than data.seq_len 2048",
    "[model]\nhead_dim = 100": "model.head_dim 100 must divide model.model_dim 768",
    "[model]\nhead_dim = 6": "model.head_dim 6 must .* be a multiple of 4",
    "[model]\nnum_layers = 3\nnum_value_embeds = 2": "model.num_value_embeds 2 takes 4 layers, model.num_layers is 3",
    "[optim]\nwarmup_frac = 0.5\ncooldown_frac = 0.6": "optim.warmup_frac and optim.cooldown_frac overlap",
    "[optim]\nmomentum_warmup_frac = 0.5\nmomentum_cooldown_frac = 0.6": "optim.momentum_warmup_frac and .* overlap",
    "[data]\nbatch_schedule = [0.3, 1]": "data.batch_schedule 0.3 of data.batch_tokens 524288 is not a multiple",
    "[data]\nbatch_schedule = [0.0]": "data.batch_schedule.0 = 0.0: input should be greater than 0",
    "[data]\nseq_schedule = [0.5, 2.0]": r"data.seq_schedule \[0.5, 2.0\]: shares lie in \(0, 1\] and the last is 1",
    "[model]\nwindow = 8\nwindow_schedule = [0.5]": r"model.window_schedule \[0.5\]: shares lie in \(0, 1\]",
    "[model]\nwindow_schedule = [0.5, 1]": "model.window_schedule needs model.window or model.short_window",
    "[model]\nwindow = 64\nshort_window = 128": "model.short_window 128 is longer than model.window 64",
    '[model]\nwindow_pattern = "SXL"': "model.window_pattern = 'SXL': string should match pattern",
    "[model]\nmodel_dim = 8\nhead_dim = 4\nsmear = true": "model.model_dim 8: gates read 12 numbers of the stream",
    "[run]\nsave_at = [0.5, 1.5]": r"run.save_at \[0.5, 1.5\]: fractions must lie in \(0, 1\]",
    "[run]\nsave_at = [0.0]": r"run.save_at \[0.0\]",
    "[run]\nsave_at = [nan]": "run.save_at.0 = nan: input should be a finite number",
}


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_settings_that_do_not_fit_together_are_refused(toml, text):
    with pytest.raises(InputError, match=IMPOSSIBLE[text]):
        load(toml(text))


@pytest.mark.parametrize("value", ["true", '"40"'])
def test_another_type_is_not_taken_for_a_number(toml, value):
    with pytest.raises(InputError, match="run.steps"):
        load(toml(f"[run]\nsteps = {value}"))


@pytest.mark.parametrize("text", ["muon_lr = inf", "adam_betas = [nan, 0.9]", "adam_betas = [0.9, 2.0]"])
def test_numbers_no_run_can_use_are_refused(toml, text):
    with pytest.raises(InputError, match="optim"):
        load(toml(f"[optim]\n{text}"))


def test_every_preset_is_whole():
    presets = sorted(Path(__file__).parent.parent.glob("configs/*.toml"))
    assert presets
    for path in presets:
        assert load(path).run.name


# -- extends


def test_a_config_is_laid_over_what_it_extends(toml):
    toml('[run]\nname = "base"\nsteps = 10\n[model]\nnum_layers = 6\n', "base.toml")
    toml('extends = "../base.toml"\n[run]\nname = "middle"\nseed = 5\n', "deep/middle.toml")
    config = load(toml('extends = "deep/middle.toml"\n[run]\nseed = 7\n[optim]\nfloor = 0.1\n'))
    assert (config.run.name, config.run.steps, config.run.seed) == ("middle", 10, 7)
    assert (config.model.num_layers, config.optim.floor) == (6, 0.1)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_cycle_of_configs_is_refused(toml, length):
    for i in range(length):
        path = toml(f'extends = "c{(i + 1) % length}.toml"\n', f"c{i}.toml")
    with pytest.raises(InputError, match="extends itself by way of"):
        load(path)


def test_a_missing_config_is_refused_also_when_extended(toml, tmp_path):
    with pytest.raises(InputError, match=r"gone\.toml: no such config file; the presets are in configs/"):
        load(tmp_path / "gone.toml")
    with pytest.raises(InputError, match=r"gone\.toml: no such config file"):
        load(toml('extends = "gone.toml"\n'))


def test_a_malformed_parent_is_refused(toml):
    toml("run = 5\n", "base.toml")
    with pytest.raises(InputError):
        load(toml('extends = "base.toml"\n[run]\nsteps = 1\n'))


# -- The command line


def test_the_command_line_has_the_last_word(toml):
    path = toml('[run]\nname = "file"\nsteps = 10\n[data]\nseq_len = 64\n')
    config = parse_args([str(path), "--run.steps", "40", "--optim.muon-lr", "0.5", "--run.save-at", "0.5", "1"])
    assert (config.run.steps, config.optim.muon_lr, config.run.save_at) == (40, 0.5, (0.5, 1.0))
    assert (config.run.name, config.data.seq_len) == ("file", 64)
    assert parse_args([str(path)]) == load(path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--run.seed", "-4"], "command line: run.seed = -4: input should be greater than or equal to 0"),
        (["--run.name", "a b"], "command line: run.name = 'a b': string should match pattern"),
        (["--data.batch-schedule", "-1"], "data.batch_schedule.0 = -1.0: input should be greater than 0"),
        (["--model.head-dim", "100"], "command line: model.head_dim 100 must divide"),
    ],
)
def test_an_option_out_of_range_is_refused_in_our_words(toml, capsys, options, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_args([str(toml("")), *options])
    assert capsys.readouterr() == ("", "")


def test_help_says_what_a_setting_does_and_seconds_have_a_short_name(toml, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert "Tokens that a long layer looks back" in capsys.readouterr().out
    assert parse_args([str(toml("")), "--max-seconds", "5"]).run.max_seconds == 5.0


@pytest.mark.parametrize(
    ("options", "sentence"), [(["--run.nosuch", "4"], "--run.nosuch"), (["--run.steps", "many"], "--run.steps")]
)
def test_bad_options_end_with_exit_code_2_and_say_why(toml, capsys, options, sentence):
    """The parser's box breaks lines; what matters is that the setting or the reason is in it."""
    with pytest.raises(SystemExit) as stop:
        parse_args([str(toml("")), *options])
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_without_a_config_there_is_nothing_to_run(tmp_path):
    for argv in ([], ["--run.steps", "4"]):
        with pytest.raises(InputError, match="no config given; usage"):
            parse_args(argv)
    with pytest.raises(InputError, match="no such config file"):
        parse_args([str(tmp_path / "gone.toml")])


# -- The digest


# Names, seeds, places of files, and what changes no number of a run; the order counts by its recipe.
NOT_OF_THE_ARM = {
    "run": set(Run.model_fields) - {"steps"},
    "data": {"shards", "val_shards", "order", "val_every", "val_every_late"},
}
OTHER = {  # a valid other value for every setting that does not take its double
    "name": "other",
    "seed": 1,
    "steps": 7,
    "out_dir": "elsewhere",
    "init_from": "elsewhere",
    "max_seconds": 9.0,
    "save_at": (0.5,),
    "order": "orders/other.npy",
    "shards": "elsewhere",
    "val_shards": "elsewhere",
    "unit": "window",
    "head_dim": 64,
    "num_value_embeds": 3,
    "muon_momentum": 0.9,
    "adam_betas": (0.7, 0.9),
    "warmup_frac": 0.1,
    "cooldown_frac": 0.5,
    "floor": 0.5,
    "wandb": "offline",
    "window": 64,
    "short_window": 64,
    "window_pattern": "L",
    "muon_coefficients": "simple",
    "target_nats": 3.28,
    "val_every_late": 5,
    "batch_schedule": (0.5, 1.0),
    "seq_schedule": (0.5, 1.0),
    "window_schedule": (0.5, 1.0),
    "mtp_weights": (0.5,),
    "momentum_low": 0.5,
}
NEEDED = {"window_schedule": {"window": 64}}  # what else must be set for a value to be valid
SETTINGS = [(table, name) for table, field in Config.model_fields.items() for name in field.annotation.model_fields]


@pytest.mark.parametrize(("table", "name"), SETTINGS)
def test_the_digest_changes_with_every_setting_that_changes_numbers_and_no_other(table, name):
    tables = Config().model_dump()
    tables[table] |= NEEDED.get(name, {})
    base = Config.model_validate(tables)
    value = tables[table][name]
    tables[table][name] = not value if isinstance(value, bool) else OTHER.get(name) or 2 * value or 0.5
    other = Config.model_validate(tables)
    assert other != base
    assert (other.digest() == base.digest()) == (name in NOT_OF_THE_ARM.get(table, ()))


def test_the_digest_tells_recipes_apart_and_is_stable():
    digests = [Config().digest(recipe) for recipe in ("", "stock", "increasing", "increasing")]
    assert len(set(digests)) == 3 and digests[2] == digests[3]
    assert all(len(d) == 12 and int(d, 16) >= 0 for d in digests)


# -- The learning rate


percents = st.integers(0, 100)


@given(warmup=percents, cooldown=percents, floor=percents, progress=st.floats(0, 1))
def test_the_learning_rate_is_a_trapezoid(warmup, cooldown, floor, progress):
    if warmup + cooldown > 100:
        warmup, cooldown = 100 - warmup, 100 - cooldown
    optim = Optim(warmup_frac=warmup / 100, cooldown_frac=cooldown / 100, floor=floor / 100)
    # Between the corners, straight lines. A side of no width is a jump: its corner belongs to the plateau.
    corners = [(0.0, 0.0)] * (warmup > 0) + [(warmup / 100, 1.0), (1 - cooldown / 100, 1.0)]
    corners += [(1.0, floor / 100)] * (cooldown > 0)
    np.testing.assert_allclose(optim.lr_scale(progress), np.interp(progress, *zip(*corners, strict=True)), atol=1e-12)


def test_a_run_without_warmup_begins_at_the_peak_and_ends_at_the_floor():
    assert Optim(cooldown_frac=0.7, floor=0.1).lr_scale(0.0) == 1.0
    assert Optim(cooldown_frac=0.7, floor=0.1).lr_scale(1.0) == 0.1
    assert Optim(cooldown_frac=0.0).lr_scale(1.0) == 1.0


@given(warmup=percents, cooldown=percents, progress=st.floats(0, 1))
def test_momentum_rises_stays_and_falls(warmup, cooldown, progress):
    if warmup + cooldown > 100:
        warmup, cooldown = 100 - warmup, 100 - cooldown
    optim = Optim(momentum_warmup_frac=warmup / 100, momentum_cooldown_frac=cooldown / 100)
    corners = [(0.0, 0.85)] * (warmup > 0) + [(warmup / 100, 0.95), (1 - cooldown / 100, 0.95)]
    corners += [(1.0, 0.85)] * (cooldown > 0)
    np.testing.assert_allclose(optim.momentum(progress), np.interp(progress, *zip(*corners, strict=True)), atol=1e-12)


@given(values=st.lists(st.floats(0.1, 1), max_size=5).map(tuple), progress=st.floats(0, 1))
def test_stages_share_the_run_equally(values, progress):
    expected = [v for i, v in enumerate(values) if i <= progress * len(values)][-1:] or [1.0]
    assert stage(values, progress) == expected[0]
