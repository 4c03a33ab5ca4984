"""Results as a table: a number, its 95 % interval, what guessing gives."""

import io
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

WORDS = {
    "image_to_text": "image to text",
    "text_to_image_filtered": "text to image, filtered",
    "text_to_image": "text to image",
    "zero_shot": "zero-shot",
    "mean_per_class": "mean per class",
    "median_rank": "median rank",
}
DETAILS = ("chance", "stderr", "low", "high")


def readable(name: str) -> str:
    """image_to_text_R@1 -> image to text R@1."""
    for key, words in WORDS.items():
        name = name.replace(key, words)
    return name.replace("_", " ")


def table(results: Mapping[str, float], *, title: str = "evaluation", width: int = 100) -> str:
    """Flat results (`split/name`, `split/name/low`, ...) as text.

    Shares are in percent, with their interval and chance; counts and ranks stand as they are.
    """
    rows = Table(title=title, title_justify="left")
    rows.add_column("")
    for heading in ("", "95 % interval", "chance"):
        rows.add_column(heading, justify="right")
    previous = None
    for name, value in results.items():
        if name.rsplit("/", 1)[-1] in DETAILS:
            continue
        split, _, metric = name.rpartition("/")
        if split != previous:
            if previous is not None:
                rows.add_section()
            rows.add_row(f"[bold]{split}[/bold]")
            previous = split
        details = {detail: results.get(f"{name}/{detail}") for detail in DETAILS}
        if details["stderr"] is None:
            rows.add_row(f"  {readable(metric)}", f"{value:,.0f}" if value == int(value) else f"{value:,.1f}")
            continue
        low, high, chance = details["low"], details["high"], details["chance"]
        between = "" if low is None or high is None else f"{100 * low:.1f} - {100 * high:.1f}"
        guess = "" if chance is None else f"{100 * chance:.2f} %"
        rows.add_row(f"  {readable(metric)}", f"{100 * value:.1f} %", between, guess)
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(rows)
    return out.getvalue().rstrip()
