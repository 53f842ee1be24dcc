"""Measures: one number per segment. Columns of the score table, and expressions over them. NumPy in, NumPy out.

From a reference (nats; means over a segment's predictions), with s = surprisal of the true next token, H = entropy
and V = varentropy of the prediction:

    nll, nll_std, entropy, entropy_std, varentropy, sqrt_varentropy, entropy_last, varentropy_last,
    surprise_gap = mean(s - H), surprise_z = sum(s - H) / sqrt(sum V), nll_per_byte

`surprise_z` is near N(0, 1) if the reference itself wrote the text: E[s] = H and Var[s] = V at every token, so the
sum is a martingale. It is the one unit-free number among them.

Without a model: length, zstd_ratio, unigram_nll, type_token_ratio. With two references: learnability.

To add a measure: compute its column in `model_measures` or `text_measures`, add its name below, and a test.
"""

import ast
import functools
import inspect
import operator
from collections.abc import Mapping

import numpy as np

from curriculum.expressions import literal, read_expression
from data.cli import InputError

TEXT_MEASURES = ("length", "zstd_ratio", "unigram_nll", "type_token_ratio")
MODEL_MEASURES = (
    "nll",
    "nll_std",
    "entropy",
    "entropy_std",
    "varentropy",
    "sqrt_varentropy",
    "entropy_last",
    "varentropy_last",
    "surprise_gap",
    "surprise_z",
    "nll_per_byte",
)
ZSTD_LEVEL = 3


def model_measures(nll_T, entropy_T, varentropy_T, length_N, num_bytes_N) -> dict[str, np.ndarray]:
    """Reduce per-token moments (T,) of N segments lying one after another to float32 columns (N,).

    Sums run in float64. `nll_per_byte` is NaN for a segment of no bytes (a lone BOS).
    """
    end_N = np.cumsum(length_N, dtype=np.int64)
    start_N = end_N - length_N
    assert end_N[-1] == len(nll_T) == len(entropy_T) == len(varentropy_T)
    nll_T, entropy_T, varentropy_T = (np.asarray(x, np.float64) for x in (nll_T, entropy_T, varentropy_T))

    def total(values_T):
        return np.add.reduceat(values_T, start_N)

    def mean(values_T):
        return total(values_T) / length_N

    def std(values_T):
        return np.sqrt(mean((values_T - np.repeat(mean(values_T), length_N)) ** 2))

    # A prediction certain to the last bit has V = 0; the floor turns 0/0 into 0 and changes nothing else.
    spread_N = np.sqrt(np.maximum(total(varentropy_T), np.finfo(np.float32).tiny))
    with np.errstate(divide="ignore", invalid="ignore"):
        nll_per_byte = np.where(num_bytes_N > 0, total(nll_T) / num_bytes_N, np.nan)
    columns = dict(
        nll=mean(nll_T),
        nll_std=std(nll_T),
        entropy=mean(entropy_T),
        entropy_std=std(entropy_T),
        varentropy=mean(varentropy_T),
        sqrt_varentropy=mean(np.sqrt(varentropy_T)),
        entropy_last=entropy_T[end_N - 1],
        varentropy_last=varentropy_T[end_N - 1],
        surprise_gap=mean(nll_T - entropy_T),
        surprise_z=total(nll_T - entropy_T) / spread_N,
        nll_per_byte=nll_per_byte,
    )
    assert tuple(columns) == MODEL_MEASURES
    return {name: column.astype(np.float32) for name, column in columns.items()}


def text_measures(target_T, length_N, token_bytes, unigram_nll_V) -> dict[str, np.ndarray]:
    """Measures of N segments from their target tokens alone; float32 columns (N,) and `num_bytes` int32.

    `target_T` holds the targets of all segments one after another, `token_bytes` the bytes of each id,
    `unigram_nll_V` = -ln f(id) of the corpus. `zstd_ratio` = compressed / raw bytes of the text, NaN for no bytes.
    """
    import zstandard

    compress = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress
    end_N = np.cumsum(length_N, dtype=np.int64)
    num_segments = len(length_N)
    num_bytes, ratio, types = np.empty(num_segments, np.int32), np.empty(num_segments), np.empty(num_segments)
    for i, (end, length) in enumerate(zip(end_N.tolist(), length_N.tolist(), strict=True)):
        tokens = target_T[end - length : end]
        text = b"".join([token_bytes[t] for t in tokens.tolist()])
        num_bytes[i] = len(text)
        ratio[i] = len(compress(text)) / len(text) if text else np.nan
        types[i] = len(np.unique(tokens)) / length
    columns = dict(
        length=length_N,
        zstd_ratio=ratio,
        unigram_nll=np.add.reduceat(unigram_nll_V[target_T], end_N - length_N) / length_N,
        type_token_ratio=types,
    )
    assert tuple(columns) == TEXT_MEASURES
    return {"num_bytes": num_bytes} | {name: column.astype(np.float32) for name, column in columns.items()}


def unigram_nll(count_V: np.ndarray) -> np.ndarray:
    """-ln of the corpus frequency of every id, add-one smoothed; float64 (V,), nats."""
    return np.log(count_V.sum() + len(count_V)) - np.log(count_V + 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Expressions over columns


def clip(x, lo, hi):
    if np.any(np.asarray(lo) > hi):
        raise InputError("measure: clip(x, lo, hi) has a lo above its hi: expected lo <= hi")
    return np.clip(x, lo, hi)


# The next three see all segments, each counting once whatever its length; `fit` is the rows they are fitted on.


def z(x, *, fit: slice):
    return (x - x[fit].mean()) / x[fit].std()


def rank(x, *, fit: slice):
    by_value = np.argsort(x)
    sorted_x, fitted = x[by_value], np.sort(x[fit])  # looked up in sorted order: that stays in cache
    below, up_to = (np.searchsorted(fitted, sorted_x, side) for side in ("left", "right"))
    ranks = np.empty(len(x))
    ranks[by_value] = (below + up_to) / (2 * len(fitted))
    return ranks


def resid(y, x, *more, fit: slice):
    def centred(values):
        return values - values[fit].mean()

    def scaled(values):  # units must not decide which singular values count as zero; a constant column explains nothing
        spread = values[fit].std()
        return centred(values) / spread if spread > 1e-12 * np.abs(values).max() else np.zeros(len(values))

    by_NK = np.stack([scaled(values) for values in (x, *more)], axis=1)
    return centred(y) - by_NK @ np.linalg.lstsq(by_NK[fit], centred(y)[fit])[0]


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
FUNCTIONS = {
    "log": lambda x: np.log(x),
    "sqrt": lambda x: np.sqrt(x),
    "abs": lambda x: np.abs(x),
    "min": lambda x, y, *more: functools.reduce(np.minimum, (x, y, *more)),
    "max": lambda x, y, *more: functools.reduce(np.maximum, (x, y, *more)),
    "clip": clip,
    "fill": lambda x, value: np.where(np.isnan(x), value, x),
    "z": z,
    "rank": rank,
    "resid": resid,
}


def evaluate(
    expression: str, columns: Mapping[str, np.ndarray], basis: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """A column or an arithmetic expression over columns (`nll - entropy`), float64 (N,). Parsed, never executed.

    Known are numbers, + - * / **, and

        log(x), sqrt(x), abs(x), min(x, y, ...), max(x, y, ...), clip(x, lo, hi)
        fill(x, value)     x, and value where x is NaN, as zstd_ratio is of a segment without text
        z(x)               (x - mean) / standard deviation
        rank(x)            share of segments below x, half of those level with it counted: strictly between 0 and 1
        resid(y, x, ...)   what the least-squares fit of y by x, ... and a constant leaves, as in
                           resid(entropy, log(length))

    The last three look at all segments alike, short or long. With a `basis` they are fitted on its segments, not on
    those of `columns`: what is validated is measured as the training segments were, or bins would mean two things.

    >>> evaluate("nll - 2 * entropy", {"nll": np.array([3.0]), "entropy": np.array([1.0])})
    array([1.])
    >>> evaluate("rank(nll)", {"nll": np.array([7.0, 2.0, 7.0, 9.0])})
    array([0.5  , 0.125, 0.5  , 0.875])
    >>> evaluate("z(nll)", {"nll": np.array([7.0])}, basis={"nll": np.array([1.0, 3.0])})
    array([5.])

    Raises InputError on anything else; on an unknown column (listing the known ones); and if a segment's value is NaN
    or infinite, at the end or within z, rank, resid: a segment that cannot be sorted is never placed.
    """
    tree = read_expression(expression, "measure", "entropy or nll - entropy")
    tables = [columns] if basis is None else [basis, columns]
    num_basis = 0 if basis is None else len(next(iter(basis.values())))
    fit = slice(num_basis or None)

    def value(node):
        match node:
            case ast.Name(id=name):
                for table in tables:
                    if name not in table:
                        raise InputError(f"measure {expression!r}: no column {name!r}; there are {', '.join(table)}")
                return np.concatenate([table[name] for table in tables], dtype=np.float64)
            case ast.Constant() if (number := literal(node)) is not None and number < 1e300:
                return np.float64(number)  # a Python float would raise on 1 / 0 and turn complex on (-1) ** 0.5
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(operand))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                return call(name, arguments)
        raise InputError(
            f"measure {expression!r}: {ast.unparse(node)!r} is not a column, a number, + - * / ** "
            f"or one of {', '.join(FUNCTIONS)}"
        )

    def call(name, arguments):
        parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
        signature = inspect.Signature([p for p in parameters if p.kind is not p.KEYWORD_ONLY])
        try:
            signature.bind(*arguments)
        except TypeError as error:
            raise InputError(f"measure {expression!r}: {name}: {error}; it is {name}{signature}") from None
        values = [value(argument) for argument in arguments]
        if len(parameters) == len(signature.parameters):
            return FUNCTIONS[name](*values)
        for argument, found in zip(arguments, values, strict=True):
            check_sortable(found, ast.unparse(argument))
        return FUNCTIONS[name](*values, fit=fit)

    def check_sortable(found, part):
        where = f"measure {expression!r}" + (f": {part!r}" if part != expression else "")
        if np.ndim(found) == 0:
            raise InputError(f"{where} names no column: every segment would get the same value")
        if len(bad := np.flatnonzero(~np.isfinite(found))):
            at = int(bad[0]) - (num_basis if bad[0] >= num_basis else 0)
            raise InputError(
                f"{where} is NaN or infinite for {len(bad)} of {len(found)} segments "
                f"(the first is segment {at}); sort by another measure or give them a value, as in fill(zstd_ratio, 1)"
            )

    with np.errstate(all="ignore"):
        result = value(tree)
    check_sortable(result, expression)
    return result[num_basis:]
