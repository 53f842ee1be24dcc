"""A run's configuration: four tables, a TOML file, overrides on the command line.

    [run]     what to call it, how long, where to put it
    [data]    shards, order, batch shape, validation
    [model]   shape of the network
    [optim]   learning rates and their schedule

    config = load("configs/demo.toml")                        # `extends = "other.toml"` fills what is not said
    config = parse_args(["configs/demo.toml", "--run.steps", "40"])

Unknown names, wrong types and impossible shapes are refused before anything is allocated. A default of a technique is
off; what it brings is said where it is done, in train_gpt.py.
"""

import dataclasses
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.cli import InputError
from data.files import digest


class Table(BaseModel):
    # strict: `steps = true` is not 1, and `steps = "40"` is not 40.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]  # of the run's tokens, or of its end
Shares = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)]  # TOML knows lists only


class Run(Table):
    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")] = "run"
    """Name of the arm: runs of one name are seeds of one experiment (letters, digits, . _ + -)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights; {seed} in data.order and run.out_dir stands for it."""
    num_seeds: Annotated[int, Field(ge=1)] = 1
    """Run this many seeds one after another, from run.seed on, in one process that compiles once."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of data.batch_tokens (a batch schedule takes other steps for the same tokens); 0 means as many as
    use every token of the order once, the last step's batch being partial."""
    out_dir: str = ""
    """Run folder; empty means runs/<name>-<digest>/seed<seed>. An unfinished run in it is continued."""
    init_from: str = ""
    """Checkpoint whose weights and optimizer state a new run begins with; its steps and schedules begin at 0. The run
    is validated once before its first step. Empty means fresh weights."""
    max_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Save and stop cleanly at the first logged step after this many seconds in this process; 0 means never."""
    save_at: Annotated[tuple[float, ...], Field(strict=False)] = ()
    """Fractions of the run (0 to 1] whose checkpoints are kept as step<k>.pt, e.g. as references."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Resume points kept: last.pt, then last-1.pt and so on, used when a newer one turns out damaged."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Save the resume point last.pt at the first logged step after this many seconds since the last save."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between rows of training loss in metrics.jsonl."""
    split_times: bool = False
    """Log the seconds of forward, backward and optimizer, waiting for the device after each: for measuring only."""
    target_nats: Annotated[float, Field(ge=0)] = 0.0
    """Validation loss whose first reaching is logged with its tokens and time (3.28 on FineWeb); 0 means none."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Copy the rows of metrics.jsonl to Weights & Biases as well."""
    tensorboard: bool = False
    """Copy them to TensorBoard event files in the run folder as well."""


class Data(Table):
    shards: str = "data/stdlib"
    """Training shards: a folder (its *_train_*.bin), a .bin file or a glob."""
    val_shards: str = ""
    """Validation shards, likewise; empty means *_val_*.bin in the folder of the training shards."""
    order: str = ""
    """Order file (.npy of curriculum.order); empty means stock order: segments as they lie in the shards."""
    unit: Literal["document", "window"] = "document"
    """What a segment is when there is no order file: a piece of a document, or a fixed window."""
    seq_len: Annotated[int, Field(ge=2)] = 1024
    """Longest segment (tokens); an order file must have been made with the same."""
    batch_tokens: Annotated[int, Field(ge=1)] = 524_288
    """Tokens in one optimizer step, over all processes."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 65_536
    """Tokens in one forward pass. batch_tokens / micro_batch_tokens micro-batches are shared out over processes."""
    val_tokens: Annotated[int, Field(ge=1)] = 10_485_760
    """Validation tokens: the first ones of the validation shards (all of them, and said, if there are fewer)."""
    val_every: Annotated[int, Field(ge=1)] = 125
    """Steps between validations; the last step is always validated."""
    val_every_late: Annotated[int, Field(ge=0)] = 0
    """Steps between validations in the last tenth of the run; 0 means val_every."""
    batch_schedule: Shares = ()
    """Batch sizes over batch_tokens, each for an equal share of the tokens, e.g. 0.5 1 1.5; learning rates go with its
    square root. Itself a curriculum: off in comparisons of orders. Empty means batch_tokens throughout."""
    seq_schedule: Shares = ()
    """Longest document over seq_len, each for an equal share of the tokens, e.g. 0.5 1; longer ones are cut, so the
    order stays what it is. Itself a curriculum. Empty means seq_len throughout."""


class Model(Table):
    num_layers: Annotated[int, Field(ge=1)] = 12
    model_dim: Annotated[int, Field(ge=8)] = 768
    """Width of the residual stream."""
    head_dim: Annotated[int, Field(ge=4)] = 128
    """Width of an attention head; divides model_dim, and by 4 (half of the pairs rotate)."""
    mlp_ratio: Annotated[int, Field(ge=1)] = 4
    """Hidden width of the MLP over model_dim."""
    rope_base: Annotated[float, Field(gt=1)] = 1024.0
    """Base of the rotary frequencies."""
    attention_scale: Annotated[float, Field(gt=0)] = 0.12
    """Factor on q.k: queries and keys have unit RMS, so 1/sqrt(head_dim) would be too flat."""
    softcap: Annotated[float, Field(ge=0)] = 15.0
    """Logits are c*x/sqrt(x^2 + c^2) with this c; 0 means no cap."""
    num_value_embeds: Annotated[int, Field(ge=0)] = 2
    """Token embeddings added to the values of the first and of the last this many layers (one table for each pair)."""
    x0_mix: bool = True
    """Every layer mixes the embedding into the stream, with two learned numbers."""
    biases: bool = False
    """Linear layers have biases."""
    gains: bool = False
    """Norms of the stream have learned gains."""
    window: Annotated[int, Field(ge=0)] = 0
    """Tokens that a long layer looks back; 0 means to the document's beginning."""
    short_window: Annotated[int, Field(ge=0)] = 0
    """Tokens that a short layer looks back; 0 means as a long one."""
    window_pattern: Annotated[str, Field(pattern="^[SL]+$")] = "SSSL"
    """Short and long layers, repeated from the first layer on; the last layer is always long."""
    window_schedule: Shares = ()
    """Windows over their size, each for an equal share of the tokens, e.g. 0.3 0.6 1; validation has them whole."""
    skip: bool = False
    """The stream after a quarter of the layers is added again before the second half, times a learned number."""
    backout: bool = False
    """The stream after two thirds of the layers is taken off again before the head, times a learned number."""
    key_offset: bool = False
    """Long layers take the half of the keys that does not rotate from the token before."""
    smear: bool = False
    """A learned share of the embedding before is added to each embedding."""
    attention_gate: bool = False
    """Every head's output is weighed by a learned function of the stream."""
    mtp_weights: Shares = ()
    """Weights of the losses of the second, third, ... token ahead, falling to 0 over two thirds of the run."""
    tie_frac: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Embedding and head are one table for this share of the run, two from then on."""


class Optim(Table):
    muon_lr: Annotated[float, Field(gt=0)] = 0.025
    """Muon's learning rate: hidden matrices."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    muon_weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled, times the learning rate."""
    momentum_low: Beta = 0.85
    """Momentum from which it rises to muon_momentum, and to which it falls at the end."""
    momentum_warmup_frac: Share = 0.0
    """Share of the run in which Muon's momentum rises."""
    momentum_cooldown_frac: Share = 0.0
    """Share of the run, at its end, in which it falls."""
    muon_iterations: Annotated[int, Field(ge=1)] = 5
    """Newton-Schulz iterations of the orthogonalisation."""
    muon_coefficients: Literal["jordan", "simple", "polar_express"] = "jordan"
    """Their coefficients: Jordan's quintic (fast, singular values 0.7 to 1.2), (2, -1.5, 0.5) (slow, exact), or the
    sequence of Polar Express."""
    normuon_beta: Beta = 0.0
    """NorMuon: decay of the second moments by which rows or columns of an update are evened out; 0 means off."""
    cautious: bool = False
    """Weight decay only where the update makes the weight smaller as well; of Muon and AdamW."""
    adam_every: Annotated[int, Field(ge=1)] = 1
    """AdamW steps at every this many steps, with the gradients of all of them."""
    embed_lr: Annotated[float, Field(gt=0)] = 0.7
    """AdamW's learning rate for the token and value embeddings."""
    head_lr: Annotated[float, Field(gt=0)] = 0.004
    scalar_lr: Annotated[float, Field(gt=0)] = 0.015
    """AdamW's learning rate for the mixing scalars."""
    adam_betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.8, 0.95)
    adam_eps: Annotated[float, Field(gt=0)] = 1e-10
    adam_weight_decay: Annotated[float, Field(ge=0)] = 0.001
    warmup_frac: Share = 0.0
    """Share of the run's tokens in which the learning rates rise linearly from 0."""
    cooldown_frac: Share = 0.7
    """Share of the run's tokens, at its end, in which they fall linearly to floor."""
    floor: Share = 0.0
    """Learning rate at the end, over the peak."""
    average_frac: Share = 0.0
    """Weights are averaged over this last share of the run; the average is what is validated and kept. With
    cooldown_frac = 0 it stands for the cooldown. 0 means off."""
    average_decay: Beta = 0.0
    """Decay of the average (an EMA) per step; 0 means that all steps weigh the same."""

    def lr_scale(self, progress: float) -> float:
        """Learning rate over its peak at `progress` in [0, 1]: rise, flat, fall to `floor` (a trapezoid).

        >>> Optim(warmup_frac=0.1, cooldown_frac=0.5).lr_scale(0.05), Optim(cooldown_frac=0.5).lr_scale(0.75)
        (0.5, 0.5)
        """
        if progress < self.warmup_frac:
            return progress / self.warmup_frac
        left = (1 - progress) / self.cooldown_frac if self.cooldown_frac else 1.0
        return self.floor + (1 - self.floor) * min(1.0, left)

    def momentum(self, progress: float) -> float:
        """Muon's momentum at `progress`: from momentum_low up to muon_momentum, and down again at the end.

        >>> round(Optim(momentum_warmup_frac=0.2).momentum(0.1), 6), Optim().momentum(0.0)
        (0.9, 0.95)
        """
        rise = progress / self.momentum_warmup_frac if self.momentum_warmup_frac else 1.0
        fall = (1 - progress) / self.momentum_cooldown_frac if self.momentum_cooldown_frac else 1.0
        share = min(1.0, rise, fall)
        return share * self.muon_momentum + (1 - share) * self.momentum_low


def stage(values: tuple[float, ...], progress: float) -> float:
    """The value of a schedule of equal stages at `progress` in [0, 1]; 1 if it has none.

    >>> stage((0.5, 1.0), 0.4), stage((0.5, 1.0), 0.5), stage((0.5, 1.0), 1.0), stage((), 0.0)
    (0.5, 1.0, 1.0, 1.0)
    """
    return values[min(int(progress * len(values)), len(values) - 1)] if values else 1.0


LOCATIONS = ("shards", "val_shards", "order", "val_every", "val_every_late")  # of [data]: where, how often; not what


GATE_DIM = 12  # gates read the first few numbers of the stream (records 28 and 34)


class Config(Table):
    run: Run = Run()
    data: Data = Data()
    model: Model = Model()
    optim: Optim = Optim()

    @model_validator(mode="after")
    def shapes_fit(self):
        data, model, optim = self.data, self.model, self.optim
        if data.batch_tokens % data.micro_batch_tokens:
            raise ValueError(
                f"data.batch_tokens {data.batch_tokens} is not a multiple of data.micro_batch_tokens "
                f"{data.micro_batch_tokens}"
            )
        if data.micro_batch_tokens < data.seq_len:
            raise ValueError(
                f"data.micro_batch_tokens {data.micro_batch_tokens} is less than data.seq_len {data.seq_len}"
            )
        if model.model_dim % model.head_dim or model.head_dim % 4:
            raise ValueError(
                f"model.head_dim {model.head_dim} must divide model.model_dim {model.model_dim} and be a multiple of 4"
            )
        for share in data.batch_schedule:
            if share * data.batch_tokens % data.micro_batch_tokens:
                raise ValueError(
                    f"data.batch_schedule {share:g} of data.batch_tokens {data.batch_tokens} is not a multiple of "
                    f"data.micro_batch_tokens {data.micro_batch_tokens}"
                )
        for name, shares in dict(data=data.seq_schedule, model=model.window_schedule).items():
            setting = dict(data="data.seq_schedule", model="model.window_schedule")[name]
            if any(share > 1 for share in shares) or (shares and shares[-1] != 1):
                raise ValueError(f"{setting} {list(shares)}: shares lie in (0, 1] and the last is 1")
        if model.window and model.short_window > model.window:
            raise ValueError(f"model.short_window {model.short_window} is longer than model.window {model.window}")
        if model.window_schedule and not (model.window or model.short_window):
            raise ValueError("model.window_schedule needs model.window or model.short_window: there is none to grow")
        if (model.smear or model.attention_gate) and model.model_dim < GATE_DIM:
            raise ValueError(f"model.model_dim {model.model_dim}: gates read {GATE_DIM} numbers of the stream")
        if (model.skip or model.backout) and model.num_layers < 4:
            raise ValueError(f"model.skip and model.backout need 4 layers, model.num_layers is {model.num_layers}")
        if 2 * model.num_value_embeds > model.num_layers:
            raise ValueError(
                f"model.num_value_embeds {model.num_value_embeds} takes {2 * model.num_value_embeds} layers, "
                f"model.num_layers is {model.num_layers}"
            )
        if optim.warmup_frac + optim.cooldown_frac > 1:
            raise ValueError("optim.warmup_frac and optim.cooldown_frac overlap: their sum is more than 1")
        if optim.momentum_warmup_frac + optim.momentum_cooldown_frac > 1:
            raise ValueError("optim.momentum_warmup_frac and optim.momentum_cooldown_frac overlap: their sum is over 1")
        if any(not 0 < fraction <= 1 for fraction in self.run.save_at):
            raise ValueError(f"run.save_at {list(self.run.save_at)}: fractions must lie in (0, 1]")
        return self

    def seeds(self) -> "list[Config]":
        """One config for each of its seeds, places filled in; several seeds in one run.out_dir get folders below it."""
        first, several = self.run.seed, self.run.num_seeds > 1
        configs = []
        for seed in range(first, first + self.run.num_seeds):
            out_dir = self.run.out_dir
            if several and out_dir and "{seed}" not in out_dir:
                out_dir += "/seed{seed}"
            run = dict(seed=seed, num_seeds=1, out_dir=out_dir.replace("{seed}", str(seed)))
            data = dict(order=self.data.order.replace("{seed}", str(seed)))
            tables = dict(run=self.run.model_copy(update=run), data=self.data.model_copy(update=data))
            configs.append(self.model_copy(update=tables))
        return configs

    def digest(self, order_recipe: str = "") -> str:
        """12 hex digits of all that changes numbers, seeds apart: the arm, not the run.

        `order_recipe` stands for the order file: arms differ by recipe, runs of an arm by the order's seed.
        Where files lie and how often things are saved or logged is left out.
        """
        tables = self.model_dump(mode="json")
        kept = {name: tables[name] for name in ("model", "optim")}
        kept["data"] = {k: v for k, v in tables["data"].items() if k not in LOCATIONS}
        return digest({**kept, "steps": self.run.steps, "order": order_recipe})


def load(path: Path | str) -> Config:
    """Read a TOML config. Raises InputError naming the setting, what was got and what is known."""
    path = Path(path)
    return validate(read_toml(path, ()), str(path))


def read_toml(path: Path, children: tuple[Path, ...]) -> dict:
    """The tables of `path` laid over those of the file it `extends` (a path relative to its own)."""
    if not path.is_file():
        raise InputError(f"{path}: no such config file; the presets are in configs/")
    if path.resolve() in children:
        raise InputError(f"{path}: extends itself by way of {' -> '.join(p.name for p in children)}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    base = read_toml(path.parent / str(parent), (*children, path.resolve()))
    for name, table in tables.items():
        if not isinstance(table, dict) or not isinstance(base.get(name, {}), dict):
            raise InputError(f"{path}: {name} must be a table, [{name}], here and in {parent}")
        base[name] = {**base.get(name, {}), **table}
    return base


def validate(tables: dict, source: str) -> Config:
    """Tables -> Config, with pydantic's complaints said as one sentence."""
    try:
        return Config.model_validate(tables)
    except ValidationError as errors:
        raise InputError(f"{source}: {'; '.join(explain(e) for e in errors.errors())}") from None


def explain(error: dict) -> str:
    """One pydantic error as a phrase: the setting, what was got, what is expected."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        table = Config.model_fields.get(str(error["loc"][0])) if len(error["loc"]) > 1 else None
        known = table.annotation.model_fields if table else Config.model_fields
        return f"unknown setting {where}; known are {', '.join(known)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{where} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def parse_args(argv: list[str] | None = None) -> Config:
    """`CONFIG.toml [--section.key value]` -> Config. InputError on a bad file or value; tyro tells of unknown options
    and exits with 2."""
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    path, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    if path is None and not {"-h", "--help"} & set(rest):
        raise InputError(
            "no config given; usage: train_gpt.py CONFIG.toml [--section.key value], e.g. configs/demo.toml"
        )
    default = load(path) if path else Config()
    loose = unchecked(default)
    usage = "train_gpt.py [--ablate] CONFIG.toml"
    options = tyro.cli(type(loose), prog=usage, default=loose, args=rest, description=__doc__.split("\n\n")[0])
    return validate(dataclasses.asdict(options), "command line")


def unchecked(table: Table):
    """The same settings as a dataclass that takes any number: values are ours to judge, in `validate`'s words."""
    import tyro

    fields = []
    for name, setting in type(table).model_fields.items():
        value = getattr(table, name)
        if isinstance(value, Table):
            value = unchecked(value)
            fields.append((name, type(value), dataclasses.field(default_factory=lambda value=value: value)))
        else:
            aliases = ("--max-seconds",) if name == "max_seconds" else None
            hint = tyro.conf.arg(help=setting.description, aliases=aliases)
            fields.append((name, Annotated[setting.annotation, hint], dataclasses.field(default=value)))
    return dataclasses.make_dataclass(type(table).__name__, fields)()
