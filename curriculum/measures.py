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
import operator
from collections.abc import Mapping

import numpy as np

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


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
FUNCTIONS = {"log": np.log, "sqrt": np.sqrt, "abs": np.abs}


def evaluate(expression: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """A column or an arithmetic expression over columns (`nll - entropy`), float64 (N,). Parsed, never executed.

    >>> evaluate("nll - 2 * entropy", {"nll": np.array([3.0]), "entropy": np.array([1.0])})
    array([1.])

    Raises InputError on anything but names, numbers, + - * / **, log, sqrt, abs; on an unknown column (listing the
    known ones); and if any segment's value is NaN or infinite: a segment that cannot be sorted is never placed.
    """
    if len(expression) > 1000:
        raise InputError(f"measure {expression[:40]!r}...: {len(expression)} characters long; expected at most 1000")
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError:
        raise InputError(f"measure {expression!r} is not an expression; write e.g. entropy or nll - entropy") from None

    def value(node):
        match node:
            case ast.Name(id=name):
                if name not in columns:
                    raise InputError(f"measure {expression!r}: no column {name!r}; there are {', '.join(columns)}")
                return np.asarray(columns[name], dtype=np.float64)
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and number < 1e300:
                return np.float64(number)  # a Python float would raise on 1 / 0 and turn complex on (-1) ** 0.5
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(operand))
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](value(argument))
        raise InputError(
            f"measure {expression!r}: {ast.unparse(node)!r} is not a column, a number, + - * / ** "
            f"or one of {', '.join(FUNCTIONS)}"
        )

    with np.errstate(all="ignore"):
        result = value(tree)
    if np.ndim(result) == 0:
        raise InputError(f"measure {expression!r} names no column: every segment would get the same value")
    if bad := int(np.count_nonzero(~np.isfinite(result))):
        raise InputError(
            f"measure {expression!r} is NaN or infinite for {bad} of {len(result)} segments "
            f"(the first is segment {int(np.flatnonzero(~np.isfinite(result))[0])}); sort by another measure"
        )
    return result
