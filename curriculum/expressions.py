"""Expressions that users write, in Python's own syntax: read by its parser and walked, never executed."""

import ast

from data.cli import InputError

DEEPEST = 200  # levels: far below where Python's own recursion ends, far above what anyone means


def read_expression(text: str, what: str, example: str, most_characters: int = 1000) -> ast.expr:
    """The syntax tree of one expression. Raises InputError, naming `what` it was to be and an `example` of one.

    >>> ast.unparse(read_expression("nll-entropy", "measure", "entropy"))
    'nll - entropy'
    """
    if len(text) > most_characters:
        raise InputError(f"{what} {shortened(text)}: {len(text)} characters long; expected at most {most_characters}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last three: null bytes, endless nesting
        raise InputError(f"{what} {shortened(text)} is not an expression; write e.g. {example}") from None
    level, depth = [tree], 0
    while level:
        level, depth = [child for node in level for child in ast.iter_child_nodes(node)], depth + 1
    if depth > DEEPEST:
        raise InputError(f"{what} {shortened(text)} is nested {depth} levels deep; expected at most {DEEPEST}")
    return tree


def shortened(text: str) -> str:
    return repr(text) if len(text) <= 200 else f"{text[:40]!r}..."


def literal(node: ast.expr) -> int | float | None:
    """The number that stands there, with its sign; None if anything else does.

    >>> [literal(read_expression(text, "", "")) for text in ("3", "-0.5", "True", "2 + 3")]
    [3, -0.5, None, None]
    """
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() as operand):
            value = literal(operand)
            return None if value is None else -value
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            # An integer that no float can hold becomes infinite, as 1e999 does: ranges then refuse it in words.
            return value if abs(value) < 2**63 else float(str(value))
    return None
