"""The report: what a comparison found, as one HTML file that needs nothing else, offline and in any browser.

    render(arms, rows) -> text of the page

A section is a function from runs and artifacts to HTML, a figure a plain dict in plotly's JSON schema. plotly.js is
inlined once; a content security policy forbids the page any request. Colours are written as CSS variables, like
"var(--grid)", and looked up in the browser, so plots follow a change from light to dark. An artifact that is gone (an
order, scores, shards) costs its section, never the page: the section says which, in the words of the InputError.

What belongs to one arm carries its number (`data-arm`, or `meta.arm` of a trace), by which the page's one filter hides
it. A figure is read and drawn when it comes near the window, so a hundred arms open as fast as five.
"""

import functools
import html
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from string import Template

import numpy as np

from curriculum.compare import ALPHA, CONFIDENCE, ORDER, Row, columns, first_reached, several
from curriculum.compare import number as plain_number
from curriculum.config import LOCATIONS
from curriculum.measures import evaluate
from curriculum.order import Order, load_order, measures_of, sorted_pool
from curriculum.records import Arms, Run
from curriculum.score import Scores, read_scores
from data.cli import InputError
from data.shards import open_corpus, read_shard
from data.tokenizer import decode, of_corpus

HUES = 6  # colours in STYLE, checked for contrast (3:1) and for the three colour blindnesses; then the dash changes
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
SVG_DASHES = ("none", "7 3", "2 2.5", "7 3 2 3")
MANY = 12  # with more arms than this the line plots begin with the baseline and the FIRST lowest
FIRST = 8
START = 0.1  # loss axes fit what comes after this share of the run; the first steps would flatten all the rest
POINTS = 200  # of a curve at most
STRETCHES = 100  # training loss is averaged over this many equal stretches of the run
FOREST_HEAD, FOREST_ROW = 110, 30  # pixels
HEAT_ROWS = 32  # of an order's heat map at most; finer bins are merged for display
HISTOGRAM_BINS = 48
ROBUST = (0.005, 0.995)  # range of a histogram, in quantiles of token mass
EXAMPLES, EXAMPLE_CHARS = 3, 400
# No difference between arms.
UNSETTING = {"run.name", "run.seed", "run.out_dir", *(f"data.{name}" for name in LOCATIONS)}

MEASURES = {  # unit, meaning; a column that is not here is shown by its name alone
    "nll": ("nats", "mean surprisal of the true next token under the reference"),
    "nll_std": ("nats", "spread of the surprisal within a segment"),
    "entropy": ("nats", "mean entropy of the reference's predictions"),
    "entropy_std": ("nats", "spread of the entropy within a segment"),
    "varentropy": ("nats²", "mean variance of the surprisal the reference expects"),
    "sqrt_varentropy": ("nats", "mean of the root of that variance"),
    "entropy_last": ("nats", "entropy of the segment's last prediction"),
    "varentropy_last": ("nats²", "varentropy of the segment's last prediction"),
    "surprise_gap": ("nats", "mean of surprisal − entropy: how much worse than the reference expected"),
    "surprise_z": ("no unit", "the same gap over its expected spread: near N(0, 1) if the reference wrote the text"),
    "nll_per_byte": ("nats/byte", "surprisal per byte of text"),
    "learnability": ("nats", "surprisal under the early reference − under the reference"),
    "length": ("tokens", "length of the segment"),
    "zstd_ratio": ("compressed/raw", "how far zstd compresses the text"),
    "unigram_nll": ("nats", "mean surprisal under the corpus's token frequencies"),
    "type_token_ratio": ("distinct/all", "share of a segment's tokens that are distinct"),
}


def render(compared: Arms, rows: list[Row], alpha: float = ALPHA, target: float | None = None) -> str:
    """The whole page. `rows` are those of the arms' comparison; `target` a loss, else the baseline's last."""
    from plotly.offline import get_plotlyjs

    baseline, arms = compared.baseline, {row.name: compared.runs[row.name] for row in rows}
    looks = assign_looks(compared.runs, baseline)
    orders, gone = find_orders(arms)
    scores_of = functools.cache(read_scores)
    sections = [
        ("result", "Result", lambda: result(rows, compared.problems, baseline, looks, alpha)),
        ("curves", "Loss curves", lambda: loss_curves(arms, baseline, looks)),
        ("differences", f"Difference to {baseline} at the end", lambda: differences(arms, rows, baseline, looks)),
        ("tokens", "Tokens saved, tokens to a target", lambda: tokens(arms, rows, baseline, looks, target)),
        ("bins", "Validation loss by bin", lambda: losses_by_bin(arms, baseline, looks)),
        ("orders", "Orders", lambda: order_maps(arms, orders, gone, looks)),
        ("measures", "Measures", lambda: measure_histograms(orders, gone, scores_of)),
        ("examples", "What the bins hold", lambda: bin_examples(arms, orders, gone, scores_of)),
        ("runs", "Run details", lambda: run_details(arms, looks)),
    ]
    built = [section(key, title, attempt(build)) for key, title, build in sections]
    return Template(PAGE).substitute(
        title=f"Data orders against {text(baseline)}",
        scope=scope(arms, baseline),
        style=STYLE,
        contents="".join(f'<li><a href="#{key}">{text(title)}</a></li>' for key, title, _ in sections),
        filter=arm_filter(len(arms)),
        result=built[0],
        key=arm_key(arms, looks),
        compared="\n".join(built[1:6]),
        rest="\n".join(built[6:]),
        plotly=get_plotlyjs(),
        script=SCRIPT,
    )


# ----------------------------------------------------------------------------------------------------------------------
# HTML


def text(value: object) -> str:
    """Escaped for HTML, and for plotly, which reads tags and entities in its labels."""
    return html.escape(str(value))


def section(key: str, title: str, body: str) -> str:
    return (
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{text(title)}</h2>\n{body}</section>'
    )


def attempt(build: Callable[[], str]) -> str:
    """What `build` returns, or a sentence where an artifact it needs cannot be read."""
    try:
        return build()
    except (InputError, OSError) as error:
        return missing([error])


def missing(reasons: Iterable[object]) -> str:
    return "".join(f'<p class="missing">Not shown: {text(reason)}.</p>' for reason in reasons)


def table(
    head: list[str], rows: list[list[str]], label: str, words: Iterable[int] = (), slots: Iterable[int] = ()
) -> str:
    """Cells are HTML: a name, then numbers (set right), and words in the columns named. Scrolls in its own box.

    A column is sorted by the button in its head. `slots` are the arms of the rows, for the filter.
    """
    kinds = ["" if i in {0, *words} else ' class="number"' for i in range(len(head))]
    header = "".join(
        f'<th scope="col"{kind}><button type="button">{cell}</button></th>' if cell else '<th scope="col"></th>'
        for kind, cell in zip(kinds, head, strict=True)
    )
    marks = [f' data-arm="{slot}"' for slot in slots] or [""] * len(rows)
    body = "\n".join(
        f'<tr{mark}><th scope="row">{first}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], cells, strict=True))
        + "</tr>"
        for mark, (first, *cells) in zip(marks, rows, strict=True)
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}"><table>'
        f"<thead><tr>{header}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def plot(figure: dict, title: str, caption: str, height: int = 360, level: int = 3, look: "Look | None" = None) -> str:
    """A figure under its title, with a caption (HTML). Its data lie beside it, and the script draws them."""
    data = json.dumps(figure, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    arm = f' data-arm="{look.slot}"' if look else ""
    return (
        f'<figure class="plot"{arm}><h{level}>{look.swatch if look else ""}{text(title)}</h{level}>'
        f'<div class="canvas" role="img" aria-label="{text(title)}" style="height:{height}px"></div>'
        f'<figcaption>{caption}</figcaption><script type="application/json">{data}</script></figure>\n'
    )


def number(value: float | None, spec: str = ".4f") -> str:
    """A number as the page sets it: a true minus sign, a dash where there is none.

    >>> number(-0.5, "+.2f"), number(None)
    ('−0.50', '–')
    """
    return minus(plain_number(value, spec))


def minus(cell: str) -> str:
    """Hyphens before digits as minus signs.

    >>> minus("-0.1 … +0.2")
    '−0.1 … +0.2'
    """
    return re.sub(r"-(?=[\d.])", "−", cell)


def span(values: Iterable[int]) -> str:
    """
    >>> span([2, 2]), span([2, 5])
    ('2', '2 to 5')
    """
    low, high = min(values := list(values)), max(values)
    return str(low) if low == high else f"{low} to {high}"


def listed(names: Iterable[str], limit: int = 6) -> str:
    """The first few, and how many more.

    >>> listed("abc", 2)
    'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def short(name: str, limit: int = 22) -> str:
    """A name that fits beside an axis, cut in its middle.

    >>> short("then(fold(5),random,tau=0.2)")
    'then(fold(5…om,tau=0.2)'
    """
    return name if len(name) <= limit + 1 else f"{name[: limit // 2]}…{name[-(limit // 2) :]}"


# ----------------------------------------------------------------------------------------------------------------------
# Arms


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, everywhere on the page."""

    slot: int  # 0 is the baseline
    color: str  # a CSS variable
    group: int  # index into DASHES, SVG_DASHES and SYMBOLS

    @property
    def line(self) -> dict:
        return dict(color=self.color, dash=DASHES[self.group], width=2)

    @property
    def swatch(self) -> str:
        return (
            '<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><line x1="1" x2="23" y1="4" y2="4" '
            f'stroke="{self.color}" stroke-dasharray="{SVG_DASHES[self.group]}"/></svg>'
        )


def assign_looks(names: Iterable[str], baseline: str) -> dict[str, Look]:
    """One look per arm, by its place among the names, not by its result: reports of the same arms look alike."""
    others = [name for name in names if name != baseline]
    looks = {baseline: Look(0, "var(--base)", 0)}
    for i, name in enumerate(others):
        looks[name] = Look(i + 1, f"var(--arm{i % HUES})", i // HUES % len(DASHES))
    return looks


def marked(name: str, looks: dict[str, Look]) -> str:
    return f"{looks[name].swatch}{text(name)}"


def arm_filter(count: int) -> str:
    return (
        '<form class="filter" role="search"><label>Filter arms <input type="search" autocomplete="off" '
        f'spellcheck="false" placeholder="words of a name"></label> <output>{several(count, "arm")}</output></form>'
    )


def arm_key(arms: Iterable[str], looks: dict[str, Look]) -> str:
    """The one legend of the page: a checkbox for every arm, in the order of the leaderboard."""
    names = list(arms)
    shown = names if len(names) <= MANY else names[: 1 + FIRST]
    boxes = "".join(
        f'<label data-arm="{looks[name].slot}"><input type="checkbox"{" checked" if name in shown else ""} '
        f'value="{looks[name].slot}">{marked(name, looks)}</label>'
        for name in names
    )
    said = "" if shown is names else f' <span class="note">first drawn: baseline and the {FIRST} lowest</span>'
    return (
        f'<fieldset class="key"><legend>Arms in the line plots</legend><div class="chips">'
        '<button type="button" data-show="all">all</button>'
        f'<button type="button" data-show="base">baseline only</button>{said}{boxes}</div></fieldset>'
    )


# ----------------------------------------------------------------------------------------------------------------------
# Figures: what they have in common


def numbers(values: Iterable, digits: int = 6) -> list:
    """JSON numbers of `digits` significant digits; None (a gap) for NaN and infinity.

    >>> numbers(np.array([1.23456789, np.nan]), 3)
    [1.23, None]
    """
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in np.asarray(values, dtype=float).tolist()]


def axis(title: str = "", **more) -> dict:
    return dict(
        title=dict(text=title, standoff=10),
        automargin=True,
        gridcolor="var(--grid)",
        linecolor="var(--line)",
        zerolinecolor="var(--grid)",
        tickcolor="var(--line)",
        ticks="outside",
        ticklen=4,
        showline=True,
        exponentformat="B",
        separatethousands=True,
        **more,
    )


def layout(x: dict, y: dict, **more) -> dict:
    return dict(
        xaxis=x,
        yaxis=y,
        margin=dict(l=8, r=12, t=8, b=8),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font=dict(family="system-ui, sans-serif", size=12, color="var(--soft)"),
        hoverlabel=dict(
            bgcolor="var(--raised)",
            bordercolor="var(--line)",
            font=dict(family="system-ui, sans-serif", color="var(--text)"),
            namelength=-1,
        ),
        hovermode="closest",
        showlegend=False,
        uirevision="keep",
        **more,
    )


def upright(x: float, color: str, width: float, **more) -> dict:
    """A vertical line across the plot."""
    at = float(x)
    return dict(type="line", yref="paper", x0=at, x1=at, y0=0, y1=1, line=dict(color=color, width=width), **more)


def around(values: Iterable[float], margin: float = 0.06) -> list[float]:
    """An axis range that holds all finite values with some room."""
    finite = np.asarray(list(values), dtype=float)
    finite = finite[np.isfinite(finite)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    room = margin * (high - low) or 0.01 * abs(high) or 1.0
    return numbers([low - room, high + room])


@dataclass(frozen=True)
class Curve:
    """An arm's mean over its runs, and their spread: mean ± sd, the range of two runs, nothing (None) for one."""

    x_P: np.ndarray
    mean_P: np.ndarray
    low_P: np.ndarray | None
    high_P: np.ndarray | None

    def minus(self, x_Q: np.ndarray, value_Q: np.ndarray) -> "Curve":
        """The same less another line, read off at this one's points."""
        base_P = np.interp(self.x_P, x_Q, value_Q)
        low_P, high_P = (None if bound is None else bound - base_P for bound in (self.low_P, self.high_P))
        return Curve(self.x_P, self.mean_P - base_P, low_P, high_P)


def average(lines: list[tuple[np.ndarray, np.ndarray]]) -> Curve:
    """Runs' (x, value) lines -> their mean, at the points of the run that has fewest (thinned to POINTS)."""
    x_P = min((x for x, _ in lines), key=len)
    inside_P = (x_P >= max(x[0] for x, _ in lines)) & (x_P <= min(x[-1] for x, _ in lines))
    x_P = x_P[inside_P] if inside_P.any() else x_P[-1:]
    x_P = x_P[np.unique(np.linspace(0, len(x_P) - 1, POINTS).round().astype(int))]
    value_RP = np.array([np.interp(x_P, x, value) for x, value in lines])
    return Curve(x_P, value_RP.mean(0), *spread(value_RP))


def spread(value_RP: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Low and high over runs: mean ± sd, for two runs their range, for one None."""
    if len(value_RP) == 1:
        return None, None
    if len(value_RP) == 2:
        return value_RP.min(0), value_RP.max(0)
    mean_P, sd_P = value_RP.mean(0), value_RP.std(0, ddof=1)
    return mean_P - sd_P, mean_P + sd_P


def spread_said(arms: dict[str, list[Run]]) -> str:
    """What the bands show, for these arms."""
    words = {1: "none for a single run", 2: "the range of two runs", 3: "mean ± sd of three or more"}
    return "; ".join(words[n] for n in sorted({min(len(runs), 3) for runs in arms.values()}, reverse=True))


def curve_traces(name: str, look: Look, n: int, curve: Curve, spec: str) -> list[dict]:
    """An arm's band and line; `spec` formats the value on hover."""
    traces = []
    x = numbers(curve.x_P, 12)
    if curve.low_P is not None:
        edge = numbers(np.concatenate([curve.high_P, curve.low_P[::-1]]))
        band = dict(x=x + x[::-1], y=edge, fill="toself", fillcolor=look.color, opacity=0.16, hoverinfo="skip")
        traces.append(dict(type="scatter", mode="lines", line=dict(width=0), meta=dict(arm=look.slot), **band))
    line = dict(
        type="scatter",
        mode="lines+markers" if len(x) <= 24 else "lines",
        x=x,
        y=numbers(curve.mean_P, 7),
        line=look.line,
        marker=dict(color=look.color, symbol=SYMBOLS[look.group], size=5),
        meta=dict(arm=look.slot),
        hovertemplate=f"<b>{text(name)}</b> (n = {n})<br>%{{y:{spec}}} nats at %{{x:,.0f}} tokens<extra></extra>",
    )
    return [*traces, line]


# ----------------------------------------------------------------------------------------------------------------------
# 1. Result


def result(rows: list[Row], problems: list[str], baseline: str, looks: dict[str, Look], alpha: float) -> str:
    notes = "".join(f"<li>{text(problem)}</li>" for problem in problems)
    sentence = text(verdict(rows, baseline, alpha)).replace(" = ", "&nbsp;=&nbsp;")
    saved = next((row.saved.said for row in rows if row.saved), None)
    return (
        f'<p class="verdict">{sentence}</p>\n{leaderboard(rows, baseline, looks)}\n'
        f"<p class='note'>Final validation loss in nats, mean over n order seeds. <i>vs baseline</i>: to "
        f"{text(baseline)}, negative is better, with its {CONFIDENCE:.0%} interval (Welch, for each arm by itself). "
        "<i>p</i>: one-sided, is the arm's loss lower? <i>Holm</i>: corrected for the number of arms tested; "
        "<i>ranks</i>: Mann–Whitney. <i>placebo</i>: against the same schedule over bins drawn by chance; "
        "<i>length</i>: over bins of the segments' length. A <i>win</i> beats all three"
        + (f". <i>Tokens saved</i>: slope from {text(saved)}" if saved else "")
        + ".</p>\n"
        + (
            f"<details open><summary>Notes ({len(problems)})</summary><ul class='notes'>{notes}</ul></details>"
            if problems
            else ""
        )
    )


def scope(arms: dict[str, list[Run]], baseline: str) -> str:
    """What was compared, in numbers."""
    first = arms[baseline][0]
    parameters = several(first.about["parameters"], "parameter")
    return (
        f"{several(len(arms), 'arm')}, {several(sum(map(len, arms.values())), 'run')}. The first of {text(baseline)}: "
        f"{parameters}, {several(first.rows[-1]['tokens'], 'training token')}, "
        f"{several(first.about['val_tokens'], 'validation token')}."
    )


def verdict(rows: list[Row], baseline: str, alpha: float = ALPHA) -> str:
    """The comparison in one sentence, with n."""
    base = next(row for row in rows if row.name == baseline)
    others = [row for row in rows if row.name != baseline and row.track == ORDER and not row.is_baseline]
    chosen = sum(row.track != ORDER and not row.is_baseline for row in rows)
    tested = [row for row in others if row.test and row.test.p_holm is not None]
    if not others:
        alone = "the only arm" if len(rows) == 1 else "the only arm that was trained on these tokens"
        return f"Nothing is compared: {baseline} (n = {base.n}) is {alone}."
    if not tested:
        return (
            f"No test could be made of {several(len(others), 'arm')} (n = {span(row.n for row in others)}) against "
            f"{baseline} (n = {base.n}): it takes two order seeds of each, and some spread between runs."
        )
    better = [row for row in tested if "baseline" in row.beaten]
    wins = [row.name for row in tested if row.win]
    worse = [row.name for row in tested if row.test.low > 0]
    if better:
        count = f"{len(better)} of {several(len(tested), 'tested arm')} beat"
        count = "The one tested arm beats" if len(tested) == 1 else count
        names = listed(
            f"{row.name} by {-row.test.difference:.4f} nats (n = {row.n}, p = {row.test.p_holm:.2g})" for row in better
        )
        said = f"{count} {baseline} (n = {base.n}) at Holm p < {alpha:g}: {names}"
        said += (
            f"; a win, against placebo and length as well: {listed(wins)}"
            if wins
            else "; no win, which takes beating a placebo and an order by length as well"
        )
    else:
        who = "The one tested arm is not" if len(tested) == 1 else f"None of {len(tested)} tested arms is"
        reach = max((row.test.high - row.test.low) / 2 for row in tested)
        said = (
            f"{who} shown to beat {baseline} (n = {span(row.n for row in tested)} against {base.n}): the smallest "
            f"Holm p is {min(row.test.p_holm for row in tested):.2g}, and intervals reach up to ± {reach:.2g} nats"
        )
    if worse:
        said += f"; worse by the whole interval: {listed(worse)}"
    if untested := len(others) - len(tested):
        said += f"; {several(untested, 'more arm')} could not be tested"
    if chosen:
        said += f"; {several(chosen, 'arm')} of other tokens (selection) stand{'s' * (chosen == 1)} apart"
    return said + "."


def leaderboard(rows: list[Row], baseline: str, looks: dict[str, Look]) -> str:
    """The table of the terminal and the README, with the arms' marks."""
    cells = columns(rows, baseline)
    names = [marked(row.name, looks) for row in rows]
    rest = [[minus(text(cell)) for cell in found] for title, found in cells.items() if title not in ("arm", "claim")]
    where = list(cells).index("claim")
    rest.insert(where - 1, [re.sub(r"\*\*(.+)\*\*", r"<strong>\1</strong>", text(cell)) for cell in cells["claim"]])
    body = [list(row) for row in zip(names, *rest, strict=True)]
    return table([text(title) for title in cells], body, "Leaderboard", [where], [looks[row.name].slot for row in rows])


# ----------------------------------------------------------------------------------------------------------------------
# 2. Loss curves


def loss_curves(arms: dict[str, list[Run]], baseline: str, looks: dict[str, Look]) -> str:
    val = {name: average([run.curve("val_nats") for run in runs]) for name, runs in arms.items()}
    end = max(curve.x_P[-1] for curve in val.values())
    train = {}
    for name, runs in arms.items():
        lines = [smooth(*run.curve("train_nats"), end) for run in runs if len(run.curve("train_nats")[0])]
        if lines:
            train[name] = average(lines)
    base = val[baseline]
    over = {name: curve.minus(base.x_P, base.mean_P) for name, curve in val.items()}
    band = f"Line: mean over runs. Band: {spread_said(arms)}"
    band += f", where no more than {MANY} arms are drawn." if len(arms) > MANY else "."
    zoom = f"The loss axis fits what comes after the first {START:.0%} of the run; double-click shows all."
    return (
        plot(
            curve_figure(arms, val, looks, end, "validation loss (nats)"),
            "Validation loss",
            f"Nats a token on the validation tokens, over training tokens. {band} {zoom}",
        )
        + plot(
            curve_figure(arms, over, looks, end, f"difference to {text(short(baseline))} (nats)", "+.4f"),
            f"Validation loss less that of {baseline}",
            f"The same lines and bands less the mean line of {text(baseline)}, whose own band lies about zero. "
            "Below zero is better. Bands show the spread of runs, not the uncertainty of a mean.",
        )
        + plot(
            curve_figure(arms, train, looks, end, "training loss (nats)"),
            "Training loss",
            "Nats a token on the batches as they came, each point the mean of the logged steps in "
            f"{1 / STRETCHES:.0%} of the run. Arms see other data at the same moment: where lines differ, it may be "
            "the data, not the model.",
        )
    )


def smooth(tokens: np.ndarray, values: np.ndarray, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Means of tokens and of values in STRETCHES equal stretches of 0..end; stretches without any are left out."""
    cell = np.minimum((tokens * STRETCHES / end).astype(int), STRETCHES - 1)
    count = np.bincount(cell, minlength=STRETCHES)
    held = count > 0
    sums = (np.bincount(cell, weights=x, minlength=STRETCHES)[held] for x in (tokens, values))
    x, y = (total / count[held] for total in sums)
    return x, y


def curve_figure(arms, curves: dict[str, Curve], looks: dict[str, Look], end: float, title: str, spec=".4f") -> dict:
    """Lines of all arms over tokens, the baseline on top."""
    traces = []
    for name in reversed(curves):
        traces += curve_traces(name, looks[name], len(arms[name]), curves[name], spec)
    x = axis("training tokens", range=numbers([0, 1.01 * end], 12))
    return dict(data=traces, layout=layout(x, axis(title), meta=dict(fit_from=START * end)))


# ----------------------------------------------------------------------------------------------------------------------
# 3. Differences


def differences(arms: dict[str, list[Run]], rows: list[Row], baseline: str, looks: dict[str, Look]) -> str:
    mean = {row.name: row.mean for row in rows}
    marks = []
    for row in rows:
        if row.test or row.is_baseline:
            base = mean[row.test.name] if row.test else row.mean
            marks.append(Mark(row.name, row.n, row.mean - base, *bounds(row.test), finals(arms[row.name]) - base))
    unknown = [row.name for row in rows if row.test and row.test.low is None]
    left_out = [row.name for row in rows if not row.test and not row.is_baseline]
    return plot(
        forest(arms, marks, looks, "difference (nats)", "%{x:+.4f} nats", 0.0),
        "Final validation loss, difference of means",
        f"Large mark and bar: difference of means and its {CONFIDENCE:.0%} Welch interval, not corrected for the "
        f"number of arms. Small circles: single runs, less the mean of {text(baseline)}. Left of the line is better."
        + (f" Too few order seeds for an interval: {text(listed(unknown))}." if unknown else "")
        + (f" No baseline of their settings: {text(listed(left_out))}." if left_out else ""),
        height=FOREST_HEAD + FOREST_ROW * len(marks),
    )


def bounds(found) -> tuple[float | None, float | None]:
    """Of anything with an interval, or of nothing."""
    return (found.low, found.high) if found is not None else (None, None)


def finals(runs: list[Run]) -> np.ndarray:
    return np.array([run.final_val_nats for run in runs])


@dataclass(frozen=True)
class Mark:
    """A row of a forest plot: a number with its interval, and those of single runs."""

    name: str
    n: int
    value: float | None
    low: float | None
    high: float | None
    single_R: np.ndarray


def forest(
    arms: dict[str, list[Run]], marks: list[Mark], looks: dict[str, Look], title: str, hover: str, zero: float | None
) -> dict:
    """A row for each arm: the interval, and its runs below. The script moves rows as arms are filtered and sorted."""
    traces, seen = [], [] if zero is None else [zero]
    for place, mark in enumerate(marks):
        look = looks[mark.name]
        seen += [*mark.single_R, *(v for v in (mark.value, mark.low, mark.high) if v is not None)]
        if len(mark.single_R):
            traces.append(
                dict(
                    type="scatter",
                    mode="markers",
                    x=numbers(mark.single_R),
                    y=[place + 0.3] * len(mark.single_R),
                    text=[text(run.folder) for run in arms[mark.name]],
                    marker=dict(color="rgba(0,0,0,0)", line=dict(color=look.color, width=1.2), size=6),
                    meta=dict(row=look.slot, below=0.3),
                    hovertemplate=f"%{{text}}<br>{hover}<extra></extra>",
                )
            )
        large = dict(
            type="scatter",
            mode="markers",
            x=numbers([np.nan if mark.value is None else mark.value]),
            y=[place],
            marker=dict(color=look.color, symbol=SYMBOLS[look.group], size=10),
            meta=dict(row=look.slot, below=0),
            hovertemplate=f"<b>{text(mark.name)}</b> (n = {mark.n})<br>{hover}<extra></extra>",
        )
        if mark.low is not None:
            above, below = numbers([mark.high - mark.value]), numbers([mark.value - mark.low])
            large["error_x"] = dict(array=above, arrayminus=below, color=look.color, thickness=2, width=5)
        traces.append(large)
    names = dict(tickvals=list(range(len(marks))), ticktext=[text(short(mark.name)) for mark in marks])
    y = axis(**names, range=[len(marks) - 0.4, -0.6], fixedrange=True) | dict(ticks="", showgrid=False, zeroline=False)
    x = axis(title, range=around(seen), nticks=7) | dict(zeroline=False)
    lines = [] if zero is None else [upright(zero, "var(--base)", 1.5, layer="between")]
    meta = dict(rows=[looks[mark.name].slot for mark in marks], head=FOREST_HEAD, row=FOREST_ROW)
    return dict(data=traces, layout=layout(x, y, shapes=lines, meta=meta))


# ----------------------------------------------------------------------------------------------------------------------
# 4. Tokens


def tokens(
    arms: dict[str, list[Run]], rows: list[Row], baseline: str, looks: dict[str, Look], target: float | None
) -> str:
    """What an arm's loss is worth in tokens, and where its runs pass a loss."""
    base = next(row for row in rows if row.name == baseline)
    level, whose = (target, "the target") if target else (base.mean, f"the mean final loss of {baseline}")
    saved = [
        Mark(row.name, row.n, 100 * row.saved.share, *(None if b is None else 100 * b for b in bounds(row.saved)), [])
        for row in rows
        if row.saved
    ]
    reached = {name: np.array([first_reached(*run.curve("val_nats"), level) for run in arms[name]]) for name in arms}
    marks = [
        Mark(row.name, row.n, float(at.mean()) if np.isfinite(at).all() else None, None, None, at)
        for row in rows
        for at in [reached[row.name]]
    ]
    short_of = [f"{name} ({np.isfinite(at).sum()} of {len(at)})" for name, at in reached.items() if np.isnan(at).any()]
    parts = ""
    if saved:
        said = next(row.saved.said for row in rows if row.saved)
        parts += plot(
            forest(arms, saved, looks, "tokens saved (%)", "%{x:+.1f} % of the tokens", 0.0),
            "Tokens saved",
            "Share of the baseline's tokens that an arm's loss makes unnecessary: its difference over the baseline's "
            f"loss per ln(tokens), from {text(said)}, with the {CONFIDENCE:.0%} interval of both errors (delta method; "
            "none where the slope is uncertain or an arm has one order seed). Right of the line is better.",
            height=FOREST_HEAD + FOREST_ROW * len(saved),
        )
    else:
        parts += missing(
            [f"tokens saved: no slope of {baseline}, which takes two validations or a run of other length"]
        )
    return parts + plot(
        forest(arms, marks, looks, "training tokens", "%{x:,.0f} tokens", None),
        f"Tokens to {level:.4f} nats",
        f"Where runs first pass {level:.4f} nats, {text(whose)}, read off between validations. Small circles: single "
        "runs; large mark: their mean, where all of them get there. Passing a loss on the way is not the same as a "
        "shorter run that ends there: its learning rate would have come down by then."
        + (f" Not all runs get there: {text(listed(short_of))}." if short_of else ""),
        height=FOREST_HEAD + FOREST_ROW * len(marks),
    )


# ----------------------------------------------------------------------------------------------------------------------
# 5. Loss by bin


def losses_by_bin(arms: dict[str, list[Run]], baseline: str, looks: dict[str, Look]) -> str:
    binned = {name: bins for name, runs in arms.items() if (bins := final_bins(runs)) is not None}
    if baseline not in binned:
        raise InputError(f"the runs of {baseline} logged no loss by bin: their orders know no validation segments")
    base = arms[baseline][0]
    measure, count = base.about["order"]["measure"], binned[baseline].shape[1]
    shown = {
        name: bins
        for name, bins in binned.items()
        if sorting_key(arms[name][0]) == sorting_key(base) and bins.shape[1] == count
    }
    other = [name for name in arms if name not in shown]
    left_out = f" Left out, with other bins or none: {text(listed(other))}." if other else ""
    return (
        plot(
            bin_figure(shown, baseline, measure, looks),
            f"Final validation loss by bin, less that of {baseline}",
            f"Validation segments in the {count} bins of <i>{text(measure)}</i>, lowest on the left; mean over runs, "
            f"in nats a token. Grey band: {text(baseline)}, {spread_said({baseline: arms[baseline]})}. Hover for the "
            f"losses themselves; a gap is a bin without validation segments.{left_out}",
        )
        + bin_table(shown, looks)
        + bins_over_training({name: arms[name] for name in shown}, baseline, count, looks)
    )


def bins_over_training(arms: dict[str, list[Run]], baseline: str, count: int, looks: dict[str, Look]) -> str:
    """The lowest, the middle and the highest bin at every validation, less the baseline's."""
    parts = ""
    for b, word in sorted({0: "lowest", count // 2: "middle", count - 1: "highest"}.items()):
        curves = {name: average([bin_curve(run, b) for run in runs]) for name, runs in arms.items()}
        base = curves[baseline]
        if not np.isfinite(base.mean_P).all():
            continue  # a bin without validation segments
        end = max(curve.x_P[-1] for curve in curves.values())
        over = {name: curve.minus(base.x_P, base.mean_P) for name, curve in curves.items()}
        figure = curve_figure(arms, over, looks, end, f"difference to {text(short(baseline))} (nats)", "+.4f")
        parts += plot(figure, f"Bin {b}, the {word}", "", 280, 4)
    return (
        "<h3>Validation loss by bin over training</h3><p class='note'>Less the mean line of "
        f"{text(baseline)} on the same bin. A bin that an arm has just trained on looks good and is soon forgotten: "
        f'what counts is the right end.</p><div class="multiples">{parts}</div>'
    )


def bin_curve(run: Run, b: int) -> tuple[np.ndarray, np.ndarray]:
    found = [(row["tokens"], row["bin_nats"][b]) for row in run.rows if "bin_nats" in row]
    return np.array([t for t, _ in found]), np.array([nats for _, nats in found], dtype=float)


def final_bins(runs: list[Run]) -> np.ndarray | None:
    """Loss by bin at the last step, (runs, bins), NaN for an empty bin; None unless all runs logged it alike."""
    rows = [[r["bin_nats"] for r in run.rows if r["step"] == run.about["steps"] and "bin_nats" in r] for run in runs]
    if not all(rows) or len({len(found[-1]) for found in rows}) > 1:
        return None
    return np.array([found[-1] for found in rows], dtype=float)


def sorting_key(run: Run) -> tuple:
    """Runs with equal keys have the same bins: their segments were sorted alike."""
    order = run.about["order"]
    return tuple(order.get(key) for key in ("measure", "bins", "multiset_sha256"))


def bin_figure(binned: dict[str, np.ndarray], baseline: str, measure: str, looks: dict[str, Look]) -> dict:
    base_RB = binned[baseline]
    base_B = base_RB.mean(0)
    bins = np.flatnonzero(np.isfinite(base_B))
    traces = []
    low_B, high_B = spread(base_RB)
    if low_B is not None:
        edge = np.concatenate([(high_B - base_B)[bins], (low_B - base_B)[bins][::-1]])
        band = dict(x=[*bins.tolist(), *bins.tolist()[::-1]], y=numbers(edge), fill="toself", hoverinfo="skip")
        look = dict(line=dict(width=0), fillcolor=looks[baseline].color, opacity=0.16, meta=dict(arm=0))
        traces.append(dict(type="scatter", mode="lines") | band | look)
    for name in reversed(binned):
        look, mean_B = looks[name], binned[name].mean(0)
        traces.append(
            dict(
                type="scatter",
                mode="lines+markers",
                x=list(range(len(mean_B))),
                y=numbers(mean_B - base_B),
                customdata=numbers(mean_B),
                line=look.line,
                marker=dict(color=look.color, symbol=SYMBOLS[look.group], size=6),
                meta=dict(arm=look.slot),
                hovertemplate=f"<b>{text(name)}</b> (n = {len(binned[name])}), bin %{{x}}<br>%{{customdata:.4f}} nats, "
                f"%{{y:+.4f}} to {text(baseline)}<extra></extra>",
            )
        )
    x = axis(f"bin of {text(measure)}", range=[-0.5, len(base_B) - 0.5], zeroline=False, **ticks_of_bins(len(base_B)))
    y = axis(f"difference to {text(short(baseline))} (nats)")
    return dict(data=traces, layout=layout(x, y, meta=dict(fit_from=0)))


def ticks_of_bins(count: int, most: int = 8) -> dict:
    """Whole bins as ticks, a power of two apart."""
    return dict(tickangle=0, tick0=0, dtick=1 << max(0, -(-count // most) - 1).bit_length())


def bin_table(binned: dict[str, np.ndarray], looks: dict[str, Look]) -> str:
    """The same as numbers, for reading and copying."""
    count = next(iter(binned.values())).shape[1]
    mean = {name: bins.mean(0) for name, bins in binned.items()}
    cell = [[number(float(m[b])) if np.isfinite(m[b]) else "–" for m in mean.values()] for b in range(count)]
    body = [[f"bin {b}", *cells] for b, cells in enumerate(cell)]
    head = ["", *(marked(name, looks) for name in binned)]
    return f"<details><summary>Losses as a table</summary>{table(head, body, 'Loss by bin')}</details>"


# ----------------------------------------------------------------------------------------------------------------------
# 6. Orders


def find_orders(arms: dict[str, list[Run]]) -> tuple[dict[str, Order], list[str]]:
    """The order of every arm's first run, and a sentence for each that cannot be had."""
    orders, gone = {}, []
    for name, runs in arms.items():
        path = runs[0].about["config"]["data"]["order"]
        if not path:
            gone.append(f"{name}: trained in stock order, without an order file")
            continue
        try:
            order = load_order(path)
        except (InputError, OSError) as error:
            gone.append(f"{name}: {error}")
            continue
        if order.manifest["order_sha256"] != runs[0].order_key:
            gone.append(f"{name}: {path} was made again: it is not the order of {runs[0].folder}")
        else:
            orders[name] = order
    return orders, gone


def order_maps(arms: dict[str, list[Run]], orders: dict[str, Order], gone: list[str], looks: dict[str, Look]) -> str:
    if not orders:
        return missing(gone)
    maps = {name: density(np.array(order.manifest["composition"], dtype=float)) for name, order in orders.items()}
    top = max(np.nanmax(map_CB) for map_CB in maps.values())
    small = ""
    for name, order in orders.items():
        about = order.manifest
        caption = f"{about['schedule']} over {about['bins']} bins of {about['measure']}, seed {about['seed']}"
        stopped = arms[name][0].rows[-1]["tokens"]
        small += plot(order_figure(maps[name], about, top, stopped), name, text(caption), 190, 4, looks[name])
    ramp = ", ".join(f"var(--heat{i})" for i in range(5))
    placebo = any("placebo(" in about["schedule"] for about in manifests(orders))
    merged = (
        f" Finer bins are merged to {HEAT_ROWS} rows." if any(o["bins"] > HEAT_ROWS for o in manifests(orders)) else ""
    )
    return (
        missing(gone)
        + "<h3>What is trained on when</h3><p class='note'>The order of each arm's first run: progress in tokens to "
        "the right, bins of the measure upwards, the lowest at the bottom. Colour: the bin's share of the tokens at "
        "that moment, as a multiple of an even share (1 everywhere would be a perfectly mixed order)."
        f"{merged}{' A placebo keeps these quotas, but its bins hold any segments.' if placebo else ''} A vertical "
        "line marks where a run stopped before the order's end.</p>"
        f'<div class="ramp"><span>0</span><i style="background:linear-gradient(to right, {ramp})"></i>'
        f"<span>{top:.3g} × an even share</span></div>"
        f'<div class="multiples">{small}</div>\n'
        + plot(
            rank_figure(orders, looks),
            "Mean rank over progress",
            "Rank of the tokens trained on at each moment: 0 the lowest of the arm's measure, 1 the highest, 0.5 the "
            "corpus as a whole. Averaged over tokens, in the same stretches of progress as the maps.",
            height=300,
        )
    )


def manifests(orders: dict[str, Order]) -> list[dict]:
    return [order.manifest for order in orders.values()]


def density(share_CB: np.ndarray) -> np.ndarray:
    """Shares of bins (C, B) as multiples of an even share, in at most HEAT_ROWS rows; NaN where no token fell."""
    num_bins = share_CB.shape[1]
    rows = min(num_bins, HEAT_ROWS)
    first = -(-np.arange(rows) * num_bins // rows)
    even = np.diff(first, append=num_bins) / num_bins
    merged_CB = np.add.reduceat(share_CB, first, axis=1) / even
    merged_CB[share_CB.sum(1) == 0] = np.nan
    return merged_CB


def order_figure(map_CB: np.ndarray, manifest: dict, top: float, stopped: int) -> dict:
    cells, rows = map_CB.shape
    step, tall = manifest["num_tokens"] / cells, manifest["bins"] / rows
    heat = dict(
        type="heatmap",
        z=[numbers(row, 3) for row in map_CB.T],
        x0=step / 2,
        dx=step,
        y0=(tall - 1) / 2,
        dy=tall,
        zmin=0,
        zmax=float(top),
        colorscale=[[i / 4, f"var(--heat{i})"] for i in range(5)],
        showscale=False,
        hovertemplate="bin %{y:.3~g} at %{x:,.0f} tokens<br>%{z:.2f} × an even share<extra></extra>",
    )
    x = axis("tokens", fixedrange=True, nticks=5, showgrid=False, range=numbers([0, manifest["num_tokens"]], 12))
    count = manifest["bins"]
    y = axis("bin", fixedrange=True, showgrid=False, range=[-0.5, count - 0.5], **ticks_of_bins(count, 5))
    shapes = [upright(stopped, "var(--text)", 1)] if stopped < manifest["num_tokens"] else []
    return dict(data=[heat], layout=layout(x, y, shapes=shapes))


def rank_figure(orders: dict[str, Order], looks: dict[str, Look]) -> dict:
    traces = []
    for name in reversed(orders):
        about, look = orders[name].manifest, looks[name]
        rank_C = np.array(about["rank_by_progress"], dtype=float)
        rank_C[np.array(about["composition"], dtype=float).sum(1) == 0] = np.nan
        middle_C = (np.arange(len(rank_C)) + 0.5) * about["num_tokens"] / len(rank_C)
        traces.append(
            dict(
                type="scatter",
                mode="lines",
                x=numbers(middle_C, 12),
                y=numbers(rank_C, 4),
                line=look.line,
                meta=dict(arm=look.slot),
                hovertemplate=f"<b>{text(name)}</b><br>mean rank %{{y:.3f}} at %{{x:,.0f}} tokens<extra></extra>",
            )
        )
    end = max(about["num_tokens"] for about in manifests(orders))
    x = axis("training tokens", range=numbers([0, end], 12))
    half = dict(type="line", xref="paper", x0=0, x1=1, y0=0.5, y1=0.5, line=dict(color="var(--base)", width=1))
    return dict(data=traces, layout=layout(x, axis("mean rank", range=[0, 1]), shapes=[half]))


# ----------------------------------------------------------------------------------------------------------------------
# 7. Measures


def scores_of_order(manifest: dict, read: Callable[[str], Scores]) -> Scores:
    """The score table an order was made from. Raises InputError if it is gone or another one took its place."""
    folder, expected = manifest["scores"]["folder"], manifest["scores"]["id"]
    scores = read(folder)
    if scores.id != expected:
        raise InputError(f"{folder}: holds scores {scores.id}, the order was made from {expected}")
    return scores


def measure_histograms(orders: dict[str, Order], gone: list[str], read: Callable[[str], Scores]) -> str:
    """The score tables behind the orders (usually one), a histogram for each column and each measure sorted by."""
    if not orders:
        return missing(gone)
    tables = {}
    for about in manifests(orders):
        tables.setdefault((about["scores"]["folder"], about["scores"]["id"]), []).append(about)
    return "".join(attempt(functools.partial(one_table, abouts, read)) for abouts in tables.values())


def one_table(abouts: list[dict], read: Callable[[str], Scores]) -> str:
    scores = scores_of_order(abouts[0], read)
    edges = {measures_of(about["measure"])[0]: about["edges"] for about in reversed(abouts)}
    columns = {name: evaluate(name, scores.columns) for name in edges} | scores.columns
    small = "".join(
        histogram(name, values, scores.segments.length_N, edges.get(name, [])) for name, values in columns.items()
    )
    rank_correlations = correlations({name: np.asarray(values, dtype=float) for name, values in columns.items()})
    return (
        f"<p class='note'>{several(len(scores.segments), 'segment')}, {several(scores.segments.num_tokens, 'token')}, "
        f"from {text(abouts[0]['scores']['folder'])}. Histograms weigh a segment by its tokens and show the "
        f"{ROBUST[0]:.1%} to {ROBUST[1]:.1%} quantiles of token mass; what lies outside is left out. Heavy line: "
        "median. Thin lines, where a measure was sorted by: edges of its bins.</p>"
        f'<div class="multiples">{small}</div>\n{rank_correlations}'
    )


def correlations(columns: dict[str, np.ndarray]) -> str:
    """Spearman's rank correlation of every two measures that vary: two that agree sort alike."""
    from scipy.stats import rankdata

    every = max(1, len(next(iter(columns.values()))) // 20_000)  # a correlation is known to 0.01 from so many
    taken = {name: values[::every] for name, values in columns.items()}
    usable = np.all([np.isfinite(v) for v in taken.values() if np.isfinite(v).any()], axis=0)
    rank_of = {name: rankdata(v[usable]) for name, v in taken.items() if np.isfinite(v).any() and np.ptp(v[usable])}
    if len(rank_of) < 2:
        return ""
    names, rho = list(rank_of), np.corrcoef(list(rank_of.values()))
    heat = dict(
        type="heatmap",
        x=[text(short(name)) for name in names],
        y=[text(short(name)) for name in names],
        z=[numbers(row, 3) for row in np.abs(rho)],
        text=[[number(r, ".2f") for r in row] for row in rho.tolist()],
        texttemplate="%{text}",
        zmin=0,
        zmax=1,
        xgap=1,
        ygap=1,
        colorscale=[[i / 4, f"var(--heat{i})"] for i in range(5)],
        showscale=False,
        hovertemplate="%{y} and %{x}: %{text}<extra></extra>",
    )
    bare = dict(ticks="", showline=False, showgrid=False, fixedrange=True)
    x, y = axis(tickangle=-40) | bare, axis(autorange="reversed") | bare
    return plot(
        dict(data=[heat], layout=layout(x, y)),
        "Rank correlation of measures",
        f"Spearman's, over {several(int(usable.sum()), 'segment')}; colour: how strong, whichever its sign.",
        height=140 + 26 * len(names),
    )


def histogram(name: str, values_N: np.ndarray, length_N: np.ndarray, edges: list[float]) -> str:
    """One measure's small figure, or a sentence where there is nothing to draw."""
    unit, meaning = MEASURES.get(name, ("", ""))
    finite = np.isfinite(values_N)
    values, weights = np.asarray(values_N[finite], dtype=float), length_N[finite]
    low, median, high = quantiles(values, weights, (ROBUST[0], 0.5, ROBUST[1])) if len(values) else (0, 0, 0)
    if not low < high:
        state = f"the same for almost every segment: {number(low, '.4g')}" if len(values) else "NaN for every segment"
        return f'<figure class="plot"><h4>{text(name)}</h4><figcaption>{state}</figcaption></figure>'
    held, edge = np.histogram(values, HISTOGRAM_BINS, (low, high), weights=weights)
    share = 100 * held / weights.sum()
    bars = dict(
        type="bar",
        x=numbers((edge[:-1] + edge[1:]) / 2),
        y=numbers(share, 4),
        width=float(edge[1] - edge[0]),
        marker=dict(color="var(--bar)", line=dict(width=0)),
        hovertemplate="around %{x:.4g}<br>%{y:.2f} % of tokens<extra></extra>",
    )
    inside = [e for e in edges if low < e < high]
    lines = [upright(e, "var(--soft)", 0.7) for e in inside[:: -(-len(inside) // 64)]] if inside else []
    lines.append(upright(median, "var(--text)", 2))
    x = axis(unit, fixedrange=True, nticks=6, range=around([low, high], 0.02), showgrid=False, zeroline=False)
    figure = layout(x, axis("% of tokens", fixedrange=True, nticks=4), shapes=lines, bargap=0)
    caption = f"{text(meaning)}{'; ' if meaning else ''}median {number(median, '.4g')}"
    if lost := len(values_N) - len(values):
        caption += f"; NaN for {several(lost, 'segment')}"
    return plot(dict(data=[bars], layout=figure), name, caption, 170, 4)


def quantiles(values: np.ndarray, weights: np.ndarray, at: Iterable[float]) -> list[float]:
    """Weighted quantiles: the first value at which the given share of the weight is reached.

    >>> quantiles(np.array([3.0, 1.0]), np.array([1, 9]), (0.5, 0.95))
    [1.0, 3.0]
    """
    by_value = np.argsort(values, kind="stable")
    mass = np.cumsum(weights[by_value], dtype=float)
    return values[by_value][np.searchsorted(mass, np.array(list(at)) * mass[-1])].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# 8. What the bins hold


def bin_examples(arms: dict[str, list[Run]], orders: dict[str, Order], gone: list[str], read) -> str:
    """Examples for each way the arms sort their segments; usually they share one."""
    if not orders:
        return missing(gone)
    ways: dict[tuple, list[str]] = {}
    for name, order in orders.items():
        about = order.manifest
        key = tuple(about[k] for k in ("measure", "bins", "multiset_sha256")) + (about["scores"]["id"],)
        ways.setdefault(key, []).append(name)
    return "".join(attempt(functools.partial(one_sorting, arms, orders, names, read)) for names in ways.values())


def one_sorting(arms: dict[str, list[Run]], orders: dict[str, Order], names: list[str], read) -> str:
    order = orders[names[0]]
    about, run = order.manifest, arms[names[0]][0]
    measure, bins = about["measure"], about["bins"]
    first = measures_of(measure)[0]
    scores = scores_of_order(about, read)
    read_text = reader(run.about["config"]["data"]["shards"], scores)
    ids_M, value_M, bin_M = sorted_pool(order, scores)
    wanted = {0: "lowest", bins // 2: "middle", bins - 1: "highest"}
    parts = []
    for b, word in sorted(wanted.items()):
        inside = np.flatnonzero(bin_M == b)
        value = value_M[inside]
        nearest = inside[np.argsort(np.abs(value - np.median(value)), kind="stable")[:EXAMPLES]]
        cards = "".join(
            f"<div><p>{text(first)} {number(value_M[i], '.4g')} · "
            f"{several(int(scores.segments.length_N[ids_M[i]]), 'token')} · segment {ids_M[i]}</p>"
            f"<pre>\n{text(read_text(int(ids_M[i])))}</pre></div>"
            for i in nearest
        )
        parts.append(
            f"<h4>Bin {b}, the {word} of {bins}: {text(first)} {number(value.min(), '.4g')} to "
            f'{number(value.max(), ".4g")}, {several(len(inside), "segment")}</h4><div class="examples">{cards}</div>'
        )
    return (
        f"<h3>{several(bins, 'bin')} of {text(measure)}</h3><p class='note'>The segments nearest to their bin's "
        f"median, their first {EXAMPLE_CHARS} characters; � stands for bytes that are no text, as where a segment "
        f"begins inside a character. Arms sorted so: {text(listed(names))}.</p>" + "".join(parts)
    )


def reader(shards: str, scores: Scores) -> Callable[[int], str]:
    """A function from a segment id to the beginning of its text.

    Raises InputError if the shards are gone or are not those that were scored.
    """
    corpus = open_corpus(shards, quiet=True)
    paths = {path.name: path for path in corpus.paths}
    for shard in scores.shards:
        if shard["name"] not in paths:
            raise InputError(f"{shards}: has no shard {shard['name']}, which was scored")
        if corpus.known_sha256.get(shard["name"], shard["sha256"]) != shard["sha256"]:
            raise InputError(f"{shards}: its shard {shard['name']} is not the one that was scored")
    encoding = of_corpus(corpus)

    def read_text(i: int) -> str:
        place = scores.segments
        tokens = read_shard(paths[scores.shards[place.shard_N[i]]["name"]])
        start, length = int(place.start_N[i]), int(place.length_N[i])
        # A token is at least a byte, a character at most four.
        whole = decode(encoding, tokens[start : start + min(length, 4 * EXAMPLE_CHARS)]).decode("utf-8", "replace")
        kept = whole[:EXAMPLE_CHARS] + ("…" if len(whole) > EXAMPLE_CHARS else "")
        return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in kept)

    return read_text


# ----------------------------------------------------------------------------------------------------------------------
# 9. Run details


def run_details(arms: dict[str, list[Run]], looks: dict[str, Look]) -> str:
    head = ["arm", "seed", "final loss", "steps", "tokens", "train s", "tokens/s", "order seed", "order", "folder"]
    body = [[marked(name, looks), *run_cells(run)] for name, runs in arms.items() for run in runs]
    slots = [looks[name].slot for name, runs in arms.items() for _ in runs]
    return (
        f"{table(head, body, 'Runs', [8, 9], slots)}<p class='note'>Training time stands still during "
        "validation. <i>order</i>: first digits of the order's SHA-256.</p>\n<h3>What differs between arms</h3>"
        + setting_differences({name: [settings(run) for run in runs] for name, runs in arms.items()}, looks)
    )


def run_cells(run: Run) -> list[str]:
    last = run.rows[-1]
    rate = last["tokens"] / last["time_s"] if last.get("time_s") else None
    return [
        str(run.about["seed"]),
        number(run.final_val_nats),
        number(run.about["steps"], ","),
        number(last["tokens"], ","),
        number(last.get("time_s"), ",.1f"),
        number(rate, ",.0f"),
        text(run.about["order"].get("seed", "–")),
        f"<code>{text(run.order_key[:12])}</code>",
        f"<code>{text(run.folder)}</code>",
    ]


def settings(run: Run) -> dict[str, str]:
    """All that was set or recorded of a run and may explain a difference, flat, as text."""
    config = run.about["config"]
    flat = {f"{group}.{key}": value for group, values in config.items() for key, value in values.items()}
    order = run.about["order"]
    flat |= {f"order.{key}": order.get(key) for key in ("measure", "schedule", "bins", "num_segments", "tokens")}
    flat |= {
        "order.multiset": (order.get("multiset_sha256") or "–")[:12],
        "code": run.about.get("code_sha256", "–")[:12],
    }
    flat |= {key: run.about.get(key) for key in ("steps", "parameters", "val_tokens", "processes")}
    flat |= {f"hardware.{key}": value for key, value in run.about.get("hardware", {}).items()}
    return {key: "–" if value is None else str(value) for key, value in flat.items() if key not in UNSETTING}


def setting_differences(of_arm: dict[str, list[dict[str, str]]], looks: dict[str, Look]) -> str:
    """A column for every setting that is not the same in all runs."""
    values = {  # arm -> setting -> its values, in the order of the runs
        name: {key: list(dict.fromkeys(s.get(key, "–") for s in found)) for s in found for key in s}
        for name, found in of_arm.items()
    }
    keys = dict.fromkeys(key for settings_of in values.values() for key in settings_of)
    differing = [key for key in keys if len({v for s in values.values() for v in s.get(key, ["–"])}) > 1]
    if not differing:
        return "<p class='note'>Nothing: all settings, code and hardware are the same.</p>"
    body = [
        [marked(name, looks), *(text(", ".join(found.get(key, ["–"]))) for key in differing)]
        for name, found in values.items()
    ]
    return (
        table(
            ["arm", *map(text, differing)],
            body,
            "Settings that differ",
            range(1, 1 + len(differing)),
            [looks[n].slot for n in values],
        )
        + f"<p class='note'>The other {len(keys) - len(differing)} settings, code and hardware included, are the same "
        "in all runs. Left out are names, seeds, places of files and validation intervals.</p>"
    )


# ----------------------------------------------------------------------------------------------------------------------
# The page

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p class="note">$scope</p>
<nav aria-label="Contents"><ol>$contents</ol></nav>
$filter
</header>
<noscript><p class="missing">Plots need JavaScript; the tables and texts do not.</p></noscript>
$result
<div>
$key
$compared
</div>
$rest
</main>
<script>$plotly</script>
<script>$script</script>
</body>
</html>
"""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --raised: #f6f7f9; --text: #1a1d21; --soft: #565d66; --line: #c9ced6; --grid: #e8eaee;
  --link: #00518f; --bar: #8aa2bd; --base: #6b7280;
  --arm0: #4c8ff7; --arm1: #c0390f; --arm2: #224522; --arm3: #c562bb; --arm4: #a09251; --arm5: #00518f;
  --heat0: #f1f4f8; --heat1: #c0d7ea; --heat2: #79aed4; --heat3: #347ab2; --heat4: #083766;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --raised: #1e232a; --text: #e4e7eb; --soft: #a7aeb8; --line: #454d58; --grid: #2a3038;
    --link: #8cc4ff; --bar: #5d7591; --base: #9aa1ac;
    --arm0: #3970d6; --arm1: #fdc3b4; --arm2: #54cd59; --arm3: #b23d8d; --arm4: #85701f; --arm5: #76ebff;
    --heat0: #1b2027; --heat1: #1e4567; --heat2: #2e74aa; --heat3: #70b2dc; --heat4: #dbeffc;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 6rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0 0.75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 0.75rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
h3 { font-size: 1.02rem; margin: 1.75rem 0 0.4rem; overflow-wrap: anywhere; }
h4 { font-size: 0.92rem; margin: 1.25rem 0 0.25rem; overflow-wrap: anywhere; }
a { color: var(--link); }
p, ul, figcaption { max-width: 46rem; }
nav ol { display: flex; flex-wrap: wrap; gap: 0.2rem 1.25rem; margin: 0; padding: 0; list-style: none;
  font-size: 0.9rem; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.filter { margin: 1rem 0 0; font-size: 0.9rem; }
.filter input { font: inherit; color: inherit; background: var(--raised); border: 1px solid var(--line);
  border-radius: 4px; padding: 0.25rem 0.5rem; width: 16rem; max-width: 100%; }
.filter output { color: var(--soft); margin-left: 0.5rem; }
[hidden] { display: none !important; }
.verdict { font-size: 1.15rem; line-height: 1.45; margin: 0.5rem 0 1.25rem; overflow-wrap: anywhere; }
.note, figcaption, .notes { color: var(--soft); font-size: 0.875rem; }
.note, .notes li { overflow-wrap: anywhere; }
.missing { color: var(--soft); border-left: 3px solid var(--line); padding-left: 0.75rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0.5rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.9rem 0.35rem 0; text-align: left; white-space: nowrap; vertical-align: baseline;
  border-bottom: 1px solid var(--grid); font-weight: 400; }
thead th { color: var(--soft); border-bottom-color: var(--line); }
.number { text-align: right; }
thead button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit; }
[aria-sort=ascending] button::after { content: " ▲"; }
[aria-sort=descending] button::after { content: " ▼"; }
tr > :first-child { position: sticky; left: 0; background: var(--page); }
th[scope=row] { min-width: 15rem; max-width: 22rem; white-space: normal; overflow-wrap: anywhere; }
th:has(.swatch) { padding-left: 1.95rem; text-indent: -1.95rem; }
small { color: var(--soft); margin-left: 0.35rem; }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.8rem; }
.swatch { width: 1.5rem; height: 0.5rem; margin-right: 0.45rem; flex: none; vertical-align: middle; }
.swatch line { stroke-width: 2.5; }
.key { position: sticky; top: 0; z-index: 10; margin: 2rem 0 0; padding: 0.5rem 0; border: 0; min-width: 0;
  background: var(--page); border-bottom: 1px solid var(--line); }
.key legend { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.chips { display: flex; flex-wrap: wrap; align-items: center; gap: 0.25rem 1rem; max-height: 5.5rem; overflow: auto;
  padding: 3px; font-size: 0.875rem; }
.chips label { display: flex; align-items: center; white-space: nowrap; cursor: pointer; }
.chips input { margin: 0 0.4rem 0 0; }
.chips button { font: inherit; color: var(--link); background: none; border: 0; padding: 0; cursor: pointer;
  text-decoration: underline; white-space: nowrap; }
.plot { margin: 0.5rem 0 2rem; min-width: 0; }
.plot > h3, .plot > h4 { margin-top: 0.5rem; }
.canvas { width: 100%; margin-bottom: 0.35rem; }
.multiples, .examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); }
.multiples { gap: 0.5rem 1.5rem; }
.examples { gap: 0.75rem 1.25rem; }
.multiples .plot { margin: 0 0 1rem; }
.multiples figcaption { font-size: 0.8rem; line-height: 1.35; overflow-wrap: anywhere; }
.ramp { display: flex; align-items: center; gap: 0.5rem; margin: 0.75rem 0 1rem; font-size: 0.8rem;
  color: var(--soft); }
.ramp i { width: 12rem; max-width: 50%; height: 0.7rem; border: 1px solid var(--line); }
.examples > div { min-width: 0; }
.examples p { margin: 0.25rem 0; font-size: 0.8rem; color: var(--soft); }
pre { margin: 0; padding: 0.6rem 0.75rem; background: var(--raised); white-space: pre-wrap; overflow-wrap: anywhere;
  line-height: 1.4; tab-size: 4; }
summary { cursor: pointer; color: var(--link); font-size: 0.9rem; }
@media (max-width: 40rem) {
  main { padding: 1rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  .chips { flex-wrap: nowrap; }
  .filter input { width: 100%; }
  th[scope=row] { min-width: 8.75rem; max-width: 10rem; font-size: 0.8rem; line-height: 1.3; }
}
@media print { .key { position: static; } .canvas { break-inside: avoid; } }
"""

SCRIPT = r"""
"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
const key = document.querySelector(".key");
const filter = document.querySelector(".filter");
const boxes = new Map([...key.querySelectorAll("input")].map(box => [Number(box.value), box]));
const names = new Map([...boxes].map(([arm, box]) => [arm, box.parentElement.textContent.toLowerCase()]));
const plots = new Map([...document.querySelectorAll("figure.plot > .canvas")].map(canvas => [canvas, {canvas}]));
let words = [];  // of the filter
let order = [...boxes.keys()];  // of the rows of forests: that of the leaderboard

const matches = arm => arm === 0 || words.every(word => names.get(arm).includes(word));

// The range of the values of the visible traces from x = start on, with some room.
function fitted(data, start) {
  let low = Infinity, high = -Infinity;
  for (const trace of data) if (trace.visible) trace.y.forEach((y, i) => {
    if (y !== null && trace.x[i] >= start) { low = Math.min(low, y); high = Math.max(high, y); }
  });
  const room = 0.06 * (high - low) || 0.01 * Math.abs(high) || 1;
  return low <= high ? [low - room, high + room] : null;
}

// Forests: a row for every arm that the filter leaves, in the leaderboard's order.
function arrange(canvas, {data, layout}) {
  const {rows, head, row} = layout.meta;
  const labels = new Map(rows.map((arm, i) => [arm, layout.yaxis.ticktext[i]]));
  const kept = order.filter(arm => labels.has(arm) && matches(arm));
  const place = new Map(kept.map((arm, i) => [arm, i]));
  for (const trace of data) {
    trace.visible = place.has(trace.meta.row);
    if (trace.visible) trace.y = trace.y.map(() => place.get(trace.meta.row) + trace.meta.below);
  }
  layout.yaxis.tickvals = kept.map((_, i) => i);
  layout.yaxis.ticktext = kept.map(arm => labels.get(arm));
  layout.yaxis.range = [kept.length - 0.4, -0.6];
  canvas.style.height = `${head + row * kept.length}px`;
  layout.height = head + row * kept.length;
}

// A copy of a figure with "var(--name)" replaced by what the style sheet says now.
function themed(value, style) {
  const name = typeof value === "string" && value.match(/^var\((--\w+)\)$/);
  if (name) return style.getPropertyValue(name[1]).trim();
  if (Array.isArray(value)) return value.map(item => themed(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
}

function draw(plot) {
  plot.figure ??= JSON.parse(plot.canvas.parentElement.querySelector("script").textContent);
  const {data, layout} = themed(plot.figure, getComputedStyle(document.documentElement));
  for (const {meta} of data) if (meta && "arm" in meta) plot.lines = true;
  if (plot.lines) {
    const shown = arm => boxes.get(arm).checked && matches(arm);
    const many = [...boxes.keys()].filter(shown).length > 12;  // bands of so many would hide the lines
    for (const trace of data) trace.visible = shown(trace.meta.arm) && !(many && trace.fill);
    if (layout.meta) layout.yaxis.range = fitted(data, layout.meta.fit_from);
  }
  if (layout.meta && layout.meta.rows) { plot.rows = true; arrange(plot.canvas, {data, layout}); }
  if (touch) {  // a finger scrolls the page, it does not zoom
    layout.dragmode = false;
    layout.xaxis.fixedrange = layout.yaxis.fixedrange = true;
  }
  return Plotly.react(plot.canvas, data, layout, {responsive: true, displayModeBar: false});
}

// Figures are drawn when they come near the window, and again when something changes.
const drawn = new Set();
function first(canvas) {
  if (drawn.has(canvas)) return;
  drawn.add(canvas);
  draw(plots.get(canvas));
}
const near = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) first(entry.target);
}, {rootMargin: "800px"});
for (const canvas of plots.keys()) near.observe(canvas);
addEventListener("beforeprint", () => [...plots.keys()].forEach(first));

const redraw = test => [...drawn].map(canvas => plots.get(canvas)).filter(test).forEach(draw);
dark.addEventListener("change", () => redraw(() => true));
key.addEventListener("change", () => redraw(plot => plot.lines));
key.addEventListener("click", event => {
  if (!event.target.dataset.show) return;
  for (const [arm, box] of boxes) box.checked = arm === 0 || event.target.dataset.show === "all" && matches(arm);
  redraw(plot => plot.lines);
});

filter?.addEventListener("submit", event => event.preventDefault());
filter?.addEventListener("input", event => {
  words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const part of document.querySelectorAll("[data-arm]")) part.hidden = !matches(Number(part.dataset.arm));
  const left = order.filter(matches).length;
  filter.querySelector("output").textContent = `${words.length ? `${left} of ` : ""}${order.length} arms`;
  // Of what is looked for, all is shown.
  if (words.length) for (const [arm, box] of boxes) box.checked ||= left <= 24 && matches(arm);
  redraw(plot => plot.lines || plot.rows);
});

// A click on a column's head sorts by it: numbers as numbers, what is no number last.
const value = (cell, number) => number
  ? parseFloat(cell.textContent.replaceAll("−", "-").replaceAll(",", "")) : cell.textContent.trim().toLowerCase();
for (const head of document.querySelectorAll("thead")) head.addEventListener("click", event => {
  const cell = event.target.closest("button")?.parentElement;
  if (!cell) return;
  const up = cell.ariaSort !== "ascending", number = cell.classList.contains("number");
  for (const other of cell.parentElement.children) other.ariaSort = null;
  cell.ariaSort = up ? "ascending" : "descending";
  const body = head.parentElement.tBodies[0];
  const keyed = [...body.rows].map(row => [value(row.cells[cell.cellIndex], number), row]);
  keyed.sort(([a], [b]) => {
    if (a !== a || b !== b) return (a !== a) - (b !== b);
    return (up ? 1 : -1) * (number ? a - b : a.localeCompare(b));
  });
  body.append(...keyed.map(([, row]) => row));
  if (!body.closest("#result")) return;
  order = [...body.rows].map(row => Number(row.dataset.arm));
  redraw(plot => plot.rows);
});
"""
