"""The text of segments as a reference model sees it: every token coloured by how uncertain or surprising it was.

    python -m scripts.view data/english --reference runs/reference --segment 17
    python -m scripts.view data/english --reference runs/reference --segment 17 --segment 4711 --out view.html

A token x_{t+1} carries the numbers of the prediction it answers, the one made after x_1 .. x_t: its own surprisal
(`nll`), and the `entropy` and `varentropy` of the distribution it was drawn from. So dark by entropy means "here the
reference did not know what comes", by nll "it did not expect this". The first token answers no prediction of the
segment and stays blank; the last one shown is the segment's last target (the next document's BOS, or the first token of
the document's next piece). Hence the means over the page are the segment's row in the score table.

With --out one HTML file that needs nothing else; without, the beginning of each segment on the terminal.
"""

import html
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Literal, NamedTuple

import numpy as np

from data.cli import InputError, command
from data.files import write_text
from data.segments import UNITS, Segments, corpus_segments
from data.shards import Corpus, open_corpus, read_shard
from data.tokenizer import of_corpus, token_bytes

UNIT = {"nll": "nats", "entropy": "nats", "varentropy": "nats²"}
MEANING = {
    "nll": "its surprisal, −ln p(token)",
    "entropy": "the entropy of the prediction it answers",
    "varentropy": "the varentropy of the prediction it answers",
}
QUANTILE = 0.98  # of the values shown: the top of the colour scale, so that one outlier does not bleach the rest
TERMINAL_TOKENS = 400
# Backgrounds of xterm's 256 colours, low to high, all light enough for black letters; the lowest level has none.
ANSI = (None, 230, 229, 222, 215, 209, 203)


def main(
    shards: str,
    /,
    reference: str,
    segment: tuple[int, ...] = (),
    by: Literal["entropy", "varentropy", "nll"] = "entropy",
    out: Path | None = None,
    max_len: int = 1024,
    unit: str = "document",
    top: float = 0.0,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Show segments with their tokens coloured by what a reference model thinks of them.

    Args:
        shards: a folder (its *_train_*.bin), a .bin file or a glob.
        reference: a run folder or checkpoint of train_gpt.py, a transformers model directory or Hub id; one that reads
            the shards' own tokens.
        segment: id of a segment, its row in the score table; may be repeated.
        by: what colours a token: entropy or varentropy of the prediction it answers, or its own nll (surprisal).
        out: the HTML file to write; without it the beginning of each segment is printed.
        max_len: longest segment (tokens), as it was scored.
        unit: what a segment is, as it was scored: document or window.
        top: value of the darkest colour; 0 means the 98 % quantile of what is shown.
        device: auto, cpu or cuda.
        dtype: of a transformers reference: auto, float32 or bfloat16.
    """
    if out is not None and out.is_dir():
        raise InputError(f"--out {out}: is a folder; name an .html file")
    if not 0 <= top < math.inf:
        raise InputError(f"--top {top}: expected a value in {UNIT[by]}, or 0 for the 98 % quantile of what is shown")
    if unit not in UNITS:
        raise InputError(f"--unit {unit}: expected one of {', '.join(UNITS)}")
    corpus = open_corpus(shards)
    segments = corpus_segments(corpus, max_len, unit)
    known = f"{shards} has segments 0 to {len(segments) - 1} (--max-len {max_len}, --unit {unit})"
    if not segment:
        raise InputError(f"name a segment with --segment; {known}")
    if outside := [i for i in segment if not 0 <= i < len(segments)]:
        raise InputError(f"--segment {outside[0]}: no such segment; {known}")
    pieces = token_bytes(of_corpus(corpus))

    from curriculum.reference import open_reference

    model = open_reference(reference, corpus, max_len, device=device, dtype=dtype)
    if model.retokenizer is not None:
        raise InputError(f"{reference}: reads text by another tokenizer than the shards': no prediction for each token")
    views = [score_segment(corpus, segments, i, model.moments) for i in dict.fromkeys(segment)]
    top = top or scale_top(views, by)
    if out is None:
        in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print("\n\n".join(on_terminal(view, by, top, pieces, corpus.bos_id, in_colour) for view in views))
        return
    write_text(out, page(views, by, top, pieces, corpus, reference))
    print(f"{out}: {len(views)} segments, {sum(len(view.token_T) - 1 for view in views):,} predictions")


class View(NamedTuple):
    """A segment of T predictions, and what the reference made of each."""

    id: int
    shard: str
    start: int  # of the first token within the shard
    token_T: np.ndarray  # (T + 1,): the inputs and the last target
    values: dict[str, np.ndarray]  # nll, entropy, varentropy: (T,), of the predictions that token_T[1:] answer


def score_segment(corpus: Corpus, segments: Segments, i: int, moments: Callable) -> View:
    """Run the reference (its `moments`) on one segment alone, which is all it saw of it when scoring, too."""
    path = corpus.paths[segments.shard_N[i]]
    start, length = int(segments.start_N[i]), int(segments.length_N[i])
    token_T = np.asarray(read_shard(path)[start : start + length + 1])
    columns = moments(token_T[:-1], token_T[1:], np.array([0, length], np.int32))
    values = {name: np.asarray(column) for name, column in zip(("nll", "entropy", "varentropy"), columns, strict=True)}
    return View(i, path.name, start, token_T, values)


def scale_top(views: list[View], by: str) -> float:
    """The value of the darkest colour for these views, two digits, above 0."""
    high = np.quantile(np.concatenate([view.values[by] for view in views]), QUANTILE)
    return max(float(f"{high:.2g}"), 0.1)


def shown(token: bytes) -> list[tuple[str, bool]]:
    r"""Runs of a token's characters: (text, whether it stands for something that is no printable character).

    Bytes that are no whole character become hex escapes, a line's end an arrow before it, other controls (and marks
    that would turn the direction of the text around them) their code.

    >>> shown(b"a\xe2\x82"), shown("é\n".encode())
    ([('a', False), ('\\xe2\\x82', True)], [('é', False), ('↵', True), ('\n', False)])
    """
    runs: list[tuple[str, bool]] = []

    def add(text: str, escaped: bool) -> None:
        if runs and runs[-1][1] == escaped:
            text = runs.pop()[0] + text
        runs.append((text, escaped))

    for c in token.decode("utf-8", "surrogateescape"):
        if 0xDC80 <= ord(c) <= 0xDCFF:
            add(f"\\x{ord(c) - 0xDC00:02x}", True)
        elif c == "\n":
            add("↵", True)
            add("\n", False)
        elif c.isprintable():
            add(c, False)
        else:
            add("⇥" if c == "\t" else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}", True)
    return runs


def one_line(token: bytes, is_bos: bool) -> str:
    """A token's text for a table: its spaces visible, nothing that breaks the line."""
    return "BOS" if is_bos else "".join(text for text, _ in shown(token)).replace("\n", "").replace(" ", "␣")


def means(view: View) -> str:
    return ", ".join(f"{name} {column.mean():.3f} {UNIT[name]}" for name, column in view.values.items())


def title(view: View) -> str:
    return f"segment {view.id}: {view.shard}, {len(view.token_T) - 1} predictions from token {view.start}"


# ----------------------------------------------------------------------------------------------------------------------
# Terminal


def on_terminal(view: View, by: str, top: float, pieces: tuple[bytes, ...], bos_id: int, in_colour: bool) -> str:
    """The beginning of a segment, with backgrounds in ANSI codes, under a legend."""

    def painted(text: str, level: int) -> str:
        return f"\x1b[38;5;16;48;5;{ANSI[level]}m{text}\x1b[0m" if in_colour and ANSI[level] else text

    values = view.values[by]
    level_T = np.minimum(np.maximum(values, 0) / top * len(ANSI), len(ANSI) - 1).astype(int)
    text = []
    for t, token in enumerate(view.token_T[:TERMINAL_TOKENS].tolist()):
        word = "⟨BOS⟩" if token == bos_id else "".join(run for run, _ in shown(pieces[token]))
        # A background carried over a line's end would colour the rest of the terminal's line.
        lines = [painted(part, level_T[t - 1]) if t and part else part for part in word.split("\n")]
        text.append("\n".join(lines))
    steps = " ".join(painted(f" {top * i / len(ANSI):.2g} ", i) for i in range(len(ANSI)))
    lines = [title(view), f"  means: {means(view)}"]
    if in_colour:
        lines.append(f"  a token's colour is {MEANING[by]}; from {UNIT[by]}: {steps}")
    lines += ["", "".join(text)]
    if (left := len(view.token_T) - TERMINAL_TOKENS) > 0:
        lines.append(f"... and {left} tokens more; --out view.html shows them all")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# HTML


def page(views: list[View], by: str, top: float, pieces: tuple[bytes, ...], corpus: Corpus, reference: str) -> str:
    """The whole page: a legend, then each segment's text and, folded away, the table of its predictions."""
    ticks = "".join(f"<span>{'≥ ' * (i == 4)}{top * i / 4:.3g}</span>" for i in range(5))
    return Template(PAGE).substitute(
        style=STYLE,
        script=SCRIPT,
        heading=html.escape(f"Tokens by {by}"),
        about=html.escape(f"{corpus.folder} ({corpus.source}) read by {reference}"),
        meaning=html.escape(MEANING[by]),
        by=by,
        unit=UNIT[by],
        ticks=ticks,
        segments="\n".join(section(view, by, top, pieces, corpus.bos_id) for view in views),
    )


def section(view: View, by: str, top: float, pieces: tuple[bytes, ...], bos_id: int) -> str:
    strength = np.clip(view.values[by] / top, 0, 1)
    tokens, rows = [], []
    for t, token in enumerate(view.token_T.tolist()):
        is_bos = token == bos_id
        runs = [("BOS", True)] if is_bos else shown(pieces[token])
        body = "".join(f"<i>{html.escape(text)}</i>" if odd else html.escape(text) for text, odd in runs)
        if t == 0:
            tokens.append(f"<span>{body}</span>")
            continue
        numbers = {name: f"{column[t - 1]:.3f}" for name, column in view.values.items()}
        name = html.escape(one_line(pieces[token], is_bos))
        said = "  ".join(f"{key} {value}" for key, value in numbers.items())
        tokens.append(f'<b style="--v:{strength[t - 1]:.2f}" title="{name}  {said}">{body}</b>')
        cells = "".join(f"<td>{value}</td>" for value in numbers.values())
        rows.append(f"<tr><td>{t}</td><th scope=row>{name}</th>{cells}</tr>")
    head = "".join(f"<th scope=col>{name} ({UNIT[name]})</th>" for name in view.values)
    return (
        f'<section><h2>{html.escape(title(view))}</h2>\n<p class="note">Means: {means(view)}.</p>\n'
        # A <pre> swallows one newline after its tag: give it one, lest it swallow the text's.
        f"<pre>\n{''.join(tokens)}</pre>\n<details><summary>All predictions as a table</summary>"
        f'<div class="scroll"><table><thead><tr><th scope=col>#</th><th scope=col>token</th>{head}</tr></thead>\n'
        f"<tbody>{chr(10).join(rows)}</tbody></table></div></details></section>"
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>$heading</title>
<style>$style</style>
</head>
<body><main>
<h1>$heading</h1>
<p class="note">$about</p>
<p>A token's colour is $meaning. The first token of a segment answers no prediction and has none; the last one shown
is the segment's last target. Point at a token, or tap it, for its numbers.</p>
<figure><div class="ramp"></div><div class="ticks">$ticks</div><figcaption>$by, $unit</figcaption></figure>
$segments
</main>
<output hidden></output>
<script>$script</script>
</body>
</html>
"""

# One hue whose strength is the value. At full strength text keeps a contrast above 4.5 to 1, light and dark.
STYLE = """
:root { color-scheme: light dark; --hot: 240 120 20; --page: #fff; --raised: #f6f7f9; --text: #1a1d21; --soft: #565d66;
  --line: #c9ced6; }
@media (prefers-color-scheme: dark) {
  :root { --hot: 190 85 10; --page: #14171c; --raised: #1e232a; --text: #e4e7eb; --soft: #a7aeb8; --line: #454d58; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 1rem 1rem 6rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
h2 { font-size: 1.05rem; margin: 2.5rem 0 0.25rem; }
.note, figcaption { color: var(--soft); font-size: 0.875rem; margin: 0.25rem 0; }
figure { margin: 1rem 0; max-width: 26rem; }
.ramp { height: 0.9rem; border: 1px solid var(--line);
  background: linear-gradient(to right, rgb(var(--hot) / 0), rgb(var(--hot) / 0.85)); }
.ticks { display: flex; justify-content: space-between; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
pre { font: 0.95rem/1.9 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 0.5rem 0; tab-size: 4; }
b { font-weight: inherit; background: rgb(var(--hot) / calc(0.85 * var(--v))); border-radius: 2px; padding: 0.15em 0;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
b:hover, b.chosen { outline: 2px solid var(--text); }
pre i { font-style: normal; font-size: 0.8em; }
summary { cursor: pointer; color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 1rem 0.15rem 0; text-align: right; white-space: nowrap; font-weight: 400;
  border-bottom: 1px solid var(--line); }
th[scope=row], th:nth-child(2) { text-align: left; font-family: ui-monospace, Menlo, Consolas, monospace; }
output { position: fixed; left: 0; right: 0; bottom: 0; padding: 0.6rem 1rem; background: var(--raised);
  border-top: 1px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere; }
"""

# A phone has nothing to hover with: a tap shows the token's title at the foot of the page.
SCRIPT = """
const shown = document.querySelector("output");
let chosen = null;
document.addEventListener("click", event => {
  const token = event.target.closest("pre b");
  chosen?.classList.remove("chosen");
  chosen = token;
  shown.hidden = !token;
  if (token) { token.classList.add("chosen"); shown.textContent = token.title; }
});
"""


def repeatable(function: Callable) -> Callable:
    """`--segment 1 --segment 2`: without this the second would silently replace the first."""
    import tyro

    return tyro.conf.configure(tyro.conf.UseAppendAction)(function)


if __name__ == "__main__":
    command(repeatable(main))
