"""Look at a curriculum before a GPU is spent on it: pictures of bins over progress, and their numbers.

    python -m scripts.preview orders/fold5-0.npy                      # an order: what it gives, and when
    python -m scripts.preview --schedule "then(fold(5), random)"      # a schedule, without scores
    python -m scripts.preview --all --html schedules.html             # every family on one page

A schedule is drawn twice: as it is wished, and as an exact order gives it, every bin used up just once. Stretches
placed by chance are drawn at their expectation.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np

from curriculum.bins import Layout
from curriculum.config import Optim
from curriculum.order import GRID, TOLERANCE, exact, load_order, wished
from curriculum.schedules import FAMILIES, parse
from data.cli import InputError, command
from data.files import atomic_path

SHADES = " ░▒▓█"
ROWS, COLUMNS = 16, 72
STRETCHES = 100  # of progress, in a picture of a schedule
NAMES = 19  # columns that the names of numbers take
TOP = 4  # times an even share: the darkest colour of the page
WISH, EXACT, GIVEN = "as wished", "as an exact order", "as ordered"

GALLERY = {
    "Controls": ("random", "stratified", "stock", "placebo(increasing)"),
    "A window on its way": ("increasing", "decreasing", "v", "inverted_v", "fold", "zigzag", "trend_cycle"),
    "A density that changes its shape": ("copula", "tilt", "pacing", "mid_out", "outside_in"),
    "Levels in stages": ("sequential", "incremental", "hybrid", "discrete([(0.5, [2, 1]), (1, [1, 2])])"),
    "Random for a while": ("warmup_then_random", "random_then_anneal", "then(fold, random)", "reverse(pacing)"),
    "As the run learns, here before it has begun": ("adaptive",),
}


def main(
    order: Path | None = None,
    /,
    schedule: str = "",
    bins: int = 16,
    all: bool = False,
    html: Path | None = None,
    cooldown_frac: float = 0.7,
    floor: float = 0.0,
) -> None:
    """Draw an order, a schedule or all schedules over progress, and print how they lean.

    Args:
        order: order file (.npy) with its manifest beside it.
        schedule: draw this instead, e.g. fold or "then(fold(5), random, tau=0.2)"; needs no scores.
        bins: of a schedule, 1 to 1024.
        all: draw every family with its defaults.
        html: write the pictures as a page to this file; it needs no network.
        cooldown_frac: of the run's learning rate, for the LR-weighted mean rank: share of tokens in which it falls.
        floor: learning rate at the end, over the peak.
    """
    if (order is not None) + bool(schedule) + all != 1:
        raise InputError("expected one of: an order file, --schedule EXPRESSION, --all")
    if not 0 <= cooldown_frac <= 1 or not 0 <= floor <= 1:
        raise InputError(f"--cooldown-frac {cooldown_frac}, --floor {floor}: expected numbers from 0 to 1")
    if not 1 <= bins <= 1024:
        raise InputError(f"--bins {bins}: expected 1 to 1024")
    if html is not None and html.is_dir():
        raise InputError(f"--html {html}: is a folder; name an .html file")
    optim = Optim(cooldown_frac=cooldown_frac, floor=floor)
    if order is not None:
        pictures = {"": [picture_of_order(order, optim)]}
    elif schedule:
        pictures = {"": [picture_of_schedule(schedule, bins, optim)]}
    else:
        pictures = {part: [picture_of_schedule(text, bins, optim) for text in texts] for part, texts in GALLERY.items()}
    if html is not None:
        with atomic_path(html) as temporary:
            temporary.write_text(page(pictures), encoding="utf-8")
        print(f"{html}: {sum(map(len, pictures.values()))} pictures")
    elif all:
        print(as_table(pictures))
    else:
        for picture in sum(pictures.values(), []):
            print(as_text(picture))


@dataclass(frozen=True)
class Picture:
    """Something to look at, in the terminal or on a page."""

    title: str
    about: str  # a sentence under the title
    panels: dict[str, np.ndarray]  # name -> (C, B): shares of the bins in C equal stretches of progress
    numbers: dict[str, str]


# ----------------------------------------------------------------------------------------------------------------------
# What there is to see


def picture_of_order(path: Path, optim: Optim) -> Picture:
    about = load_order(path).manifest
    rank_C = np.array(about["rank_by_progress"])
    used, held, epochs = about["num_tokens"], about["corpus_tokens"], about["epochs"]
    if about["multiset"] == "exact":
        coverage, uses = used / epochs / held, "each once" if epochs == 1 else f"each {epochs} times"
    else:
        coverage = about["coverage"]
        uses = f"a selection: {about['omitted_segments']:,} segments never, {about['repeated_segments']:,} repeated"
    return Picture(
        str(path),
        f"{about['schedule']} over {about['bins']} bins of {about['measure']}, seed {about['seed']}",
        {GIVEN: np.array(about["composition"])},
        {
            "segments": f"{about['num_segments']:,}",
            "tokens": f"{used:,}; of {held:,} scored {coverage:.1%} are used, {uses}",
            "tokens a bin": f"{min(about['bin_tokens']):,} to {max(about['bin_tokens']):,}",
            "mean rank": f"{rank_C.mean():.3f}, {leaning(rank_C, optim)} (0 lowest {about['measure']}, 1 highest)",
            "schedule error": f"{about['schedule_error']:.1e} of a moment's tokens, at most",
            "deviation": f"{about['largest_deviation_tokens']:,.0f} tokens of any bin from its schedule, at most",
            "adjacent batches": f"{about['batch_distance']['mean']:.3f} apart (0 bins alike, 1 none in common)",
            "order": about["order_sha256"][:16],
            "multiset": f"{about['multiset_sha256'][:16]} (equal for orders of the same tokens)",
        },
    )


def picture_of_schedule(expression: str, num_bins: int, optim: Optim) -> Picture:
    """The wish, and what becomes of it where every bin holds as many tokens and is used up just once."""
    schedule = parse(expression)
    wish_GB = wished(schedule, Layout(num_bins)) * GRID
    asked_B = wish_GB.mean(0) * num_bins
    panels = {WISH: stretches(wish_GB)}
    numbers = {WISH: leaning(panels[WISH] @ middle_ranks(num_bins), optim)}
    try:
        exact_GB, error = exact(schedule, Layout(num_bins))
        panels[EXACT] = stretches(exact_GB * GRID)
        numbers[EXACT] = leaning(panels[EXACT] @ middle_ranks(num_bins), optim)
        if error > TOLERANCE:
            numbers["schedule error"] = f"{error:.0e} of a moment's tokens, at most"
    except InputError as refusal:
        numbers[EXACT] = f"impossible: {refusal}"
    numbers["wished of a bin"] = f"{asked_B.min():.2f} to {asked_B.max():.2f} times what it holds"
    if schedule.iid_spans:
        spans = ", ".join(f"{a:.3g} to {b:.3g}" for a, b in schedule.iid_spans)
        numbers["by chance"] = f"progress {spans}"
    if schedule.placebo:
        numbers["placebo"] = "ranks are those of the bins, which hold any segments"
    family = FAMILIES[schedule.text.partition("(")[0]]
    return Picture(expression, inspect.getdoc(family).partition("\n")[0].replace("`", ""), panels, numbers)


def middle_ranks(num_bins: int) -> np.ndarray:
    return (np.arange(num_bins) + 0.5) / num_bins


def stretches(weights_GB: np.ndarray, count: int = STRETCHES) -> np.ndarray:
    """Mean rows of `count` equal stretches of progress, (count, B)."""
    first = np.arange(count) * len(weights_GB) // count
    return np.add.reduceat(weights_GB, first) / np.diff(first, append=len(weights_GB))[:, None]


def leaning(rank_C: np.ndarray, optim: Optim) -> str:
    """Where the weight of a run lies: mean rank under its learning rate, and at its very end."""
    last = rank_C[-max(1, len(rank_C) // 20) :]
    weighted = np.average(rank_C, weights=lr_weights(optim, len(rank_C)))
    return f"LR-weighted {weighted:.3f}, last 5 % {last.mean():.3f}"


def lr_weights(optim: Optim, num_cells: int) -> np.ndarray:
    """Learning rate over its peak in the middle of each of `num_cells` stretches of progress."""
    return np.array([optim.lr_scale((i + 0.5) / num_cells) for i in range(num_cells)])


# ----------------------------------------------------------------------------------------------------------------------
# In the terminal


def as_text(picture: Picture) -> str:
    gap = 4
    columns = (COLUMNS - gap * (len(picture.panels) - 1)) // len(picture.panels)
    drawn = [[f"{name:{columns}}", *draw(panel, columns)] for name, panel in picture.panels.items()]
    rows = [(" " * gap).join(row).rstrip() for row in zip(*drawn, strict=True)]
    values = [f"{name:{NAMES}}{value}" for name, value in picture.numbers.items()]
    indented = [f"  {line}".rstrip() for line in ["", *rows, "", *values]]
    return "\n".join([f"{picture.title}: {picture.about}", *indented])


def draw(composition_CB: np.ndarray, columns: int = COLUMNS) -> list[str]:
    """Shares of the bins over progress as text: highest bin on top, darker where more of the tokens come from it."""
    num_cells, num_bins = composition_CB.shape
    rows = min(ROWS, num_bins)
    # Average cells and bins into the picture's columns and rows; sums over bins, so that a row is a share.
    column = np.minimum(np.arange(num_cells) * columns // num_cells, columns - 1)
    picture = np.zeros((columns, rows))
    np.add.at(picture, column, np.add.reduceat(composition_CB, np.arange(rows) * num_bins // rows, axis=1))
    picture /= np.maximum(np.bincount(column, minlength=columns), 1)[:, None]
    level = np.minimum((picture * rows / 2 * len(SHADES)).astype(int), len(SHADES) - 1)  # 2x the even share is black
    lines = ["".join(SHADES[i] for i in level[:, row]) for row in reversed(range(rows))]
    return [*lines, f"{'0':<{columns - 8}}progress"]


def as_table(pictures: dict[str, list[Picture]]) -> str:
    """Only the numbers, a line for each."""
    lines = []
    for part, found in pictures.items():
        lines += ["", part]
        for picture in found:
            lines += [f"  {picture.title}", *(f"    {name:{NAMES}}{value}" for name, value in picture.numbers.items())]
    return "\n".join([*lines, "", "Pictures: --html FILE, or --schedule EXPRESSION for one of them."])


# ----------------------------------------------------------------------------------------------------------------------
# On a page: the report's looks and script


def page(pictures: dict[str, list[Picture]]) -> str:
    from plotly.offline import get_plotlyjs

    from curriculum.report import SCRIPT, STYLE, text

    num_bins = {panel.shape[1] for found in pictures.values() for p in found for panel in p.panels.values()}
    parts = "".join(
        f'<section><h2>{text(part)}</h2><div class="multiples">{"".join(map(as_figure, found))}</div></section>'
        for part, found in pictures.items()
    )
    if len(pictures) == 1:  # one picture has the page for itself
        parts = as_figure(*sum(pictures.values(), []), height=420)
    return Template(PAGE).substitute(
        title="Schedules" if len(pictures) > 1 else "Preview",
        bins=", ".join(f"{b:,} bin{'s' * (b > 1)}" for b in sorted(num_bins)),
        top=TOP,
        ramp=", ".join(f"var(--heat{i})" for i in range(5)),
        style=STYLE + MORE_STYLE,
        parts=parts,
        plotly=get_plotlyjs(),
        script=SCRIPT,
    )


def as_figure(picture: Picture, height: int = 165) -> str:
    """Panels side by side, with the report's colours, under one title."""
    from curriculum.report import axis, density, layout, numbers, plot, text

    gap, count = 0.06, len(picture.panels)
    wide = (1 - gap * (count - 1)) / count
    traces, axes, labels = [], {}, []
    for i, (name, panel_CB) in enumerate(picture.panels.items()):
        map_CR, left, ordinal = density(panel_CB), i * (wide + gap), "" if i == 0 else str(i + 1)
        cells, rows = map_CR.shape
        heat = dict(x0=0.5 / cells, dx=1 / cells, y0=0.5 / rows, dy=1 / rows, zmin=0, zmax=TOP, showscale=False)
        traces.append(
            dict(
                type="heatmap",
                z=[numbers(row, 3) for row in map_CR.T],
                colorscale=[[step / 4, f"var(--heat{step})"] for step in range(5)],
                xaxis=f"x{ordinal}",
                yaxis=f"y{ordinal}",
                hovertemplate="rank %{y:.2f} at progress %{x:.2f}<br>%{z:.2f} × an even share<extra></extra>",
            )
            | heat
        )
        shared = dict(fixedrange=True, showgrid=False, range=[0, 1], zeroline=False)
        x = axis(**shared, domain=[left, left + wide], anchor=f"y{ordinal}", tickvals=[0, 0.5, 1], tickangle=0)
        y = axis(**shared, anchor=f"x{ordinal}", tickvals=[0, 0.5, 1], showticklabels=i == 0)
        axes |= {f"xaxis{ordinal}": x, f"yaxis{ordinal}": y}
        place = dict(x=left, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom", showarrow=False)
        labels.append(dict(text=name, font=dict(size=11, color="var(--soft)")) | place)
    for ax in axes.values():
        del ax["title"]  # it would take room
    base = layout(axes.pop("xaxis"), axes.pop("yaxis"), annotations=labels, **axes)
    base["margin"] = dict(l=8, r=8, t=20, b=8)
    said = "".join(f"<br>{text(name)}: {text(value)}" for name, value in picture.numbers.items())
    return plot(dict(data=traces, layout=base), picture.title, f"{text(picture.about)}{said}", height)


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
<h1>$title</h1>
<p class="note">Progress of the run to the right, ranks of the measure upwards, over $bins. Colour: share of the
moment's tokens, as a multiple of an even share. An exact order uses every bin up just once. Numbers are mean ranks,
weighted by the learning rate and at the end of the run.</p>
<div class="ramp"><span>0</span><i style="background:linear-gradient(to right, $ramp)"></i><span>$top × or more</span>
</div>
<noscript><p class="missing">Pictures need JavaScript.</p></noscript>
<fieldset class="key" hidden></fieldset>
$parts
</main>
<script>$plotly</script>
<script>$script</script>
</body>
</html>
"""

# The report's script looks for its legend: the hidden fieldset above stands in for it.
MORE_STYLE = """
main { max-width: 86rem; }
h2 { margin-top: 1.5rem; }
.multiples { grid-template-columns: repeat(auto-fill, minmax(min(23rem, 100%), 1fr)); gap: 0.25rem 2rem; }
.multiples .plot > h3 { margin-bottom: 0; }
"""


if __name__ == "__main__":
    command(main)
