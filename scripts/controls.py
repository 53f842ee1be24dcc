"""The controls of an order: what its claim must beat, over the same tokens, in one word.

    python -m scripts.controls --order orders/fold5-0.npy

writes beside it fold5-0-random.npy (chance), -reverse (the same schedule backwards), -placebo (the same schedule over
bins dealt by chance), -length (the same schedule over bins of segments by length: is the measure more than that?) and
-stock (the corpus as it lies). An order beats its controls, or it has shown nothing about its measure.
"""

from pathlib import Path

from curriculum import order as orders
from curriculum.schedules import parse
from data.cli import InputError, command

CONTROLS = {
    "random": dict(schedule="random"),
    "reverse": dict(schedule="reverse({schedule})"),
    "placebo": dict(schedule="placebo({schedule})"),
    "length": dict(measure="length"),
    "stock": dict(schedule="stock"),
}


def main(
    order: Path,
    seed: int | None = None,
    only: tuple[str, ...] = (),
    scores: Path | None = None,
    out: Path | None = None,
) -> None:
    """Write the matched controls of an order.

    Args:
        order: the order file (.npy); its manifest says what it was made of.
        seed: of the controls; None means the order's own.
        only: some of random, reverse, placebo, length, stock; none means all that differ from the order itself.
        scores: the score folder, if it has moved.
        out: folder for the controls; None means the order's.
    """
    from curriculum.score import read_scores

    if unknown := [name for name in only if name not in CONTROLS]:
        raise InputError(f"--only {unknown[0]}: expected some of {', '.join(CONTROLS)}")
    about = orders.load_order(order).manifest
    if about["multiset"] != "exact":
        raise InputError(
            f"{order}: a reweighted order selects its tokens, so nothing else is over the same ones; make its random "
            "and placebo with curriculum.order and the same --multiset, --tokens and --scores"
        )
    if about["schedule"] == "stock":
        raise InputError(f"{order}: the corpus as it lies is a control itself: name the order that is to be tested")
    folder = scores or Path(about["scores"]["folder"])
    if (found := read_scores(folder).id) != about["scores"]["id"]:
        raise InputError(
            f"{folder}: holds scores {found}, the order was made from {about['scores']['id']}; see --scores"
        )
    paths = {name: (out or order.parent) / f"{order.stem}-{name}.npy" for name in only or CONTROLS}
    written = 0
    for name, path in paths.items():
        if name == "reverse" and "adaptive" in about:
            print(f"{path}: not written, what is drawn as a run goes has no reverse")
            continue
        options = variant(about, name)
        if (options["measure"], parse(options["schedule"]).text) == (about["measure"], about["schedule"]):
            print(f"{path}: not written, {order.name} is its own {name} control")
            continue
        orders.main(folder, path, **options | ({} if seed is None else {"seed": seed}))
        if orders.load_order(path).manifest["multiset_sha256"] != about["multiset_sha256"]:
            raise InputError(
                f"{path}: came out over other tokens than {order}, which an older version made: order again"
            )
        written += 1
    print(f"{written} controls of {order}, over the same {about['num_tokens']:,} tokens")


def variant(about: dict, name: str) -> dict:
    """The options of curriculum.order that make a control, from the manifest of the order it controls."""
    layout = about["layout"]
    options = {key: about[key] for key in ("measure", "schedule", "seed", "subset_seed", "epochs")} | layout
    options |= {key: text.format(schedule=about["schedule"]) for key, text in CONTROLS[name].items()}
    if name == "length":  # one measure takes the place of two
        options |= dict(bins=layout["bins"] * layout["second_bins"], second_bins=1, axis=1)
    return options | dict(tokens=about["budget_tokens"])


if __name__ == "__main__":
    command(main)
