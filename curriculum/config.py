"""A run's configuration: four tables, a TOML file, overrides on the command line.

    [run]     what to call it, how long, where to put it
    [data]    shards, order, batch shape, validation
    [model]   shape of the network
    [optim]   learning rates and their schedule

    config = load("configs/demo.toml")                        # `extends = "other.toml"` fills what is not said
    config = parse_args(["configs/demo.toml", "--run.steps", "40"])

Unknown names, wrong types and impossible shapes are refused before anything is allocated.
"""

import sys
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.cli import InputError
from data.files import digest


class Table(BaseModel):
    # strict: `steps = true` is not 1, and `steps = "40"` is not 40.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Beta = Annotated[float, Field(ge=0, lt=1)]


class Run(Table):
    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")] = "run"
    """Name of the arm: runs of one name are seeds of one experiment (letters, digits, . _ + -)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps; 0 means as many as use every token of the order once, the last step's batch being partial."""
    out_dir: str = ""
    """Run folder; empty means runs/<name>-<digest>/seed<seed>. An unfinished run in it is continued."""
    max_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Save and stop cleanly at the first logged step after this many seconds in this process; 0 means never."""
    save_at: Annotated[tuple[float, ...], Field(strict=False)] = ()  # TOML knows lists only
    """Fractions of the run (0 to 1] whose checkpoints are kept as step<k>.pt, e.g. as references."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Save the resume point last.pt at the first logged step after this many seconds since the last save."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between rows of training loss in metrics.jsonl."""


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


class Optim(Table):
    muon_lr: Annotated[float, Field(gt=0)] = 0.025
    """Muon's learning rate: hidden matrices."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    muon_weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled, times the learning rate."""
    muon_iterations: Annotated[int, Field(ge=1)] = 5
    """Newton-Schulz iterations of the orthogonalisation."""
    embed_lr: Annotated[float, Field(gt=0)] = 0.7
    """AdamW's learning rate for the token and value embeddings."""
    head_lr: Annotated[float, Field(gt=0)] = 0.004
    scalar_lr: Annotated[float, Field(gt=0)] = 0.015
    """AdamW's learning rate for the mixing scalars."""
    adam_betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.8, 0.95)
    adam_eps: Annotated[float, Field(gt=0)] = 1e-10
    adam_weight_decay: Annotated[float, Field(ge=0)] = 0.001
    warmup_frac: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the run's tokens in which the learning rates rise linearly from 0."""
    cooldown_frac: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Share of the run's tokens, at its end, in which they fall linearly to floor."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end, over the peak."""

    def lr_scale(self, progress: float) -> float:
        """Learning rate over its peak at `progress` in [0, 1]: rise, flat, fall to `floor` (a trapezoid).

        >>> Optim(warmup_frac=0.1, cooldown_frac=0.5).lr_scale(0.05), Optim(cooldown_frac=0.5).lr_scale(0.75)
        (0.5, 0.5)
        """
        if progress < self.warmup_frac:
            return progress / self.warmup_frac
        left = (1 - progress) / self.cooldown_frac if self.cooldown_frac else 1.0
        return self.floor + (1 - self.floor) * min(1.0, left)


LOCATIONS = ("shards", "val_shards", "order", "val_every")  # of [data]: where and how often, not what


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
        if 2 * model.num_value_embeds > model.num_layers:
            raise ValueError(
                f"model.num_value_embeds {model.num_value_embeds} takes {2 * model.num_value_embeds} layers, "
                f"model.num_layers is {model.num_layers}"
            )
        if optim.warmup_frac + optim.cooldown_frac > 1:
            raise ValueError("optim.warmup_frac and optim.cooldown_frac overlap: their sum is more than 1")
        if any(not 0 < fraction <= 1 for fraction in self.run.save_at):
            raise ValueError(f"run.save_at {list(self.run.save_at)}: fractions must lie in (0, 1]")
        return self

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
    """`CONFIG.toml [--section.key value]` -> Config. InputError on a bad file; on a bad option tyro exits with 2."""
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    path, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    if path is None and not {"-h", "--help"} & set(rest):
        raise InputError(
            "no config given; usage: train_gpt.py CONFIG.toml [--section.key value], e.g. configs/demo.toml"
        )
    default = load(path) if path else Config()
    config = tyro.cli(
        Config, prog="train_gpt.py CONFIG.toml", default=default, args=rest, description=__doc__.split("\n\n")[0]
    )
    return validate(config.model_dump(), "command line")
