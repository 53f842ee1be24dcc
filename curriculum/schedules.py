"""Schedules: how much of each bin a run wants at each moment. Pure functions, NumPy in, NumPy out.

A schedule maps progress t in [0, 1] (in tokens) to weights over B bins: non-negative, each row summing to 1. Bin 0
holds the lowest values of the measure, and bin b sits at rank (b + 1/2) / B. Most families slide a window whose
centre mu(t) is a curve and whose width is `sigma`, a fraction of all ranks: sigma, not B, is the true coarse/fine knob.

A schedule is written as an expression, the same in TOML and on the command line, parsed and never executed:

    parse("then(fold(5), random, tau=0.2)")

To add one: write a function that returns a `Schedule`, put it into FAMILIES, and a line into tests/test_schedules.py.
"""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from data.cli import InputError


@dataclass(frozen=True)
class Schedule:
    """What a run wants: `weights(t_T, num_bins)` -> (T, B).

    `iid_spans` are stretches of progress where emission times are drawn uniformly rather than spread evenly:
    there the order is that of an honest shuffle, with its chance fluctuations, as in a random baseline.
    `placebo` asks the order to permute the map from segments to bins: same quotas, no meaning.
    """

    weights: Callable[[np.ndarray, int], np.ndarray]
    iid_spans: tuple[tuple[float, float], ...] = ()
    placebo: bool = False
    text: str = ""  # the expression with every argument spelled out: equal texts are equal schedules


def window(mu_T: np.ndarray, num_bins: int, sigma: float) -> np.ndarray:
    """Rows (T, B) proportional to exp(-(rank_b - mu)^2 / (2 sigma^2)).

    sigma = 0 is the sharpest window there is: the two bins nearest to mu, mixed linearly.

    >>> window(np.array([0.0, 0.5, 1.0]), 2, 0.0)
    array([[1. , 0. ],
           [0.5, 0.5],
           [0. , 1. ]])
    """
    rank_B = (np.arange(num_bins) + 0.5) / num_bins
    if sigma == 0:
        mu_T = np.clip(mu_T, rank_B[0], rank_B[-1])
        weights_TB = np.maximum(0.0, 1 - np.abs(mu_T[:, None] - rank_B) * num_bins)
    else:
        # Below 1e-6 of all ranks a window is as sharp as it can be, and its square would underflow.
        exponent_TB = -((mu_T[:, None] - rank_B) ** 2) / (2 * max(sigma, 1e-6) ** 2)
        weights_TB = np.exp(exponent_TB - exponent_TB.max(1, keepdims=True))
    return weights_TB / weights_TB.sum(1, keepdims=True)


def uniform(t_T: np.ndarray, num_bins: int) -> np.ndarray:
    return np.full((len(t_T), num_bins), 1 / num_bins)


def sliding(centre: Callable[[np.ndarray], np.ndarray], sigma: float) -> Schedule:
    """The window of width sigma whose centre follows `centre(t)`."""
    check_range("sigma", sigma, 0, 10)
    return Schedule(lambda t_T, num_bins: window(centre(t_T), num_bins, sigma))


def random() -> Schedule:
    """Every bin alike at every moment, placed by chance: the control. Several order seeds are needed of it."""
    return Schedule(uniform, iid_spans=((0.0, 1.0),))


def stratified() -> Schedule:
    """Every bin alike at every moment, spread evenly: each batch has its exact share of every bin."""
    return Schedule(uniform)


def increasing(sigma: float = 0.08) -> Schedule:
    """From low to high: mu = t.

    >>> increasing(sigma=0).weights(np.array([0.0, 1.0]), 3)
    array([[1., 0., 0.],
           [0., 0., 1.]])
    """
    return sliding(lambda t: t, sigma)


def decreasing(sigma: float = 0.08) -> Schedule:
    """From high to low: mu = 1 - t.

    >>> decreasing(sigma=0).weights(np.array([0.0, 1.0]), 2)
    array([[0., 1.],
           [1., 0.]])
    """
    return sliding(lambda t: 1 - t, sigma)


def warmup_then_random(tau: float = 0.15, sigma: float = 0.08) -> Schedule:
    """From low to high within the first tau of the run (0 < tau < 1), on an even tau-share of each bin; then random.

    The one use of order for which gains on held-out loss are published (arXiv 2506.11300).

    >>> warmup_then_random(0.5, sigma=0).weights(np.array([0.0, 0.499999, 0.5, 1.0]), 2).round(3)
    array([[1. , 0. ],
           [0. , 1. ],
           [0.5, 0.5],
           [0.5, 0.5]])
    """
    return then(increasing(sigma), random(), 1 - check_range("tau", tau, 0, 1, open_ends=True))


def fold(K: int = 5, sigma: float = 0.08) -> Schedule:
    """Sawtooth: from low to high K times (K >= 1), mu = frac(K t); at t = 1 it ends high (DELT's folding, K = 5).

    >>> fold(2, sigma=0).weights(np.array([0.0, 0.4999, 0.5, 1.0]), 2).round(2)
    array([[1., 0.],
           [0., 1.],
           [1., 0.],
           [0., 1.]])
    """
    check_count("K", K)
    return sliding(lambda t: np.where(t < 1, (K * t) % 1.0, 1.0), sigma)


def zigzag(K: int = 5, sigma: float = 0.08) -> Schedule:
    """Triangle wave of K strokes (K >= 1): low to high, high to low, ... An odd K ends high, an even one low.

    >>> zigzag(2, sigma=0).weights(np.array([0.0, 0.5, 1.0]), 2)
    array([[1., 0.],
           [0., 1.],
           [1., 0.]])
    """
    check_count("K", K)
    return sliding(lambda t: 1 - np.abs((K * t) % 2.0 - 1), sigma)


def then(first: Schedule, second: Schedule, tau: float = 0.2) -> Schedule:
    """`first` over the first 1 - tau of the run, `second` over the last tau (0 < tau < 1).

    With `random` second, no run ends in an extreme bin: otherwise a periodic order measures little but its last stroke.

    >>> then(increasing(sigma=0), random(), tau=0.5).weights(np.array([0.0, 0.75]), 2)
    array([[1. , 0. ],
           [0.5, 0.5]])
    """
    check_range("tau", tau, 0, 1, open_ends=True)
    if first.placebo or second.placebo:
        raise InputError("placebo permutes the bins of a whole run: write placebo(then(...)), not then(placebo(...))")
    cut = 1 - tau

    def weights(t_T, num_bins):
        early_TB = first.weights(np.clip(t_T / cut, 0, 1), num_bins)
        late_TB = second.weights(np.clip((t_T - cut) / tau, 0, 1), num_bins)
        return np.where((t_T < cut)[:, None], early_TB, late_TB)

    early = tuple((a * cut, b * cut) for a, b in first.iid_spans)
    late = tuple((cut + a * tau, cut + b * tau) for a, b in second.iid_spans)
    return Schedule(weights, iid_spans=early + late)


def placebo(schedule: Schedule) -> Schedule:
    """The same schedule over bins whose segments were dealt by chance: keeps quotas and mechanics, no meaning."""
    return replace(schedule, placebo=True)


FAMILIES: dict[str, Callable[..., Schedule]] = {
    f.__name__: f for f in (random, stratified, increasing, decreasing, warmup_then_random, fold, zigzag, then, placebo)
}


def parse(text: str) -> Schedule:
    """A schedule from its expression. Raises InputError on unknown names or arguments, listing the known ones."""
    if len(text) > 1000:
        raise InputError(f"schedule {text[:40]!r}...: {len(text)} characters long; expected at most 1000")
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise InputError(f"schedule {text!r} is not an expression; write e.g. fold(5) or {EXAMPLE}") from None

    def build(node) -> Schedule | int | float:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.Name(id=name):
                return call(name, [], {})
            case ast.Call(func=ast.Name(id=name), args=positional, keywords=named):
                return call(name, [build(a) for a in positional], {k.arg: build(k.value) for k in named})
        raise InputError(f"schedule {text!r}: {ast.unparse(node)!r} is neither a schedule nor a number")

    def call(name, positional, named) -> Schedule:
        if name not in FAMILIES:
            raise InputError(f"schedule {text!r}: unknown name {name!r}; known are {', '.join(FAMILIES)}")
        signature = inspect.signature(FAMILIES[name])
        try:
            bound = signature.bind(*positional, **named)
        except TypeError as error:
            raise InputError(f"schedule {text!r}: {name}: {error}; it is {name}{readable(signature)}") from None
        for parameter, value in bound.arguments.items():
            wants_schedule = signature.parameters[parameter].annotation is Schedule
            if wants_schedule != isinstance(value, Schedule):
                kind = "a schedule" if wants_schedule else "a number"
                raise InputError(
                    f"schedule {text!r}: {name}: {parameter} must be {kind}; it is {name}{readable(signature)}"
                )
        bound.apply_defaults()
        shown = ", ".join(
            f"{p}={v.text}" if isinstance(v, Schedule) else f"{p}={v}" for p, v in bound.arguments.items()
        )
        return replace(FAMILIES[name](**bound.arguments), text=f"{name}({shown})" if shown else name)

    schedule = build(tree)
    if not isinstance(schedule, Schedule):
        raise InputError(f"schedule {text!r} is a number; write e.g. fold(5) or {EXAMPLE}")
    return schedule


EXAMPLE = "then(fold(5), random, tau=0.2)"


def readable(signature: inspect.Signature) -> str:
    """`(K=5, sigma=0.08)`: parameters and defaults without their types."""
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in signature.parameters.values()]
    return f"({', '.join(shown)})"


def check_range(name: str, value: float, low: float, high: float, *, open_ends: bool = False) -> float:
    if not (low < value < high if open_ends else low <= value <= high):
        between = f"strictly between {low} and {high}" if open_ends else f"from {low} to {high}"
        raise InputError(f"schedule: {name} = {value} is out of range: expected {between}")
    return value


def check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or not 1 <= value <= 10_000:
        raise InputError(f"schedule: {name} = {value} is out of range: expected a whole number from 1 to 10000")
