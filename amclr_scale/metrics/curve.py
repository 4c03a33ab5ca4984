"""The learning curve of a run, as a picture."""

import json
import warnings
from pathlib import Path
from typing import Any

from amclr_scale.metrics.scores import score_of, words_of

POINTS = 4000  # of a line: more than a picture has pixels


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl: every evaluation, and of the others about `POINTS`, evenly spread."""
    file = folder / "metrics.jsonl"
    with file.open("rb") as lines:
        head = [len(line) for line, _ in zip(lines, range(100), strict=False)]
        every = max(1, file.stat().st_size * len(head) // (max(sum(head), 1) * POINTS))
        lines.seek(0)
        chosen = [line for number, line in enumerate(lines) if number % every == 0 or b'"eval/' in line]
    return [json.loads(line) for line in chosen]


def _is_drawn(key: str) -> bool:
    score = score_of(key)
    return score is not None and score.drawn


def _draw_score(axes: Any, key: str, known: list[dict[str, Any]]) -> None:
    """One number's line, over the band of its intervals, and what guessing gives."""
    samples, words = [r["samples"] for r in known], f"{key[5:].rpartition('/')[0]}: {words_of(key)}"
    filtered = "_filtered_" in key  # mostly what the unfiltered one is, which would hide under it
    style = {"linewidth": 4, "alpha": 0.4, "zorder": 1} if filtered else {"marker": "o", "markersize": 3, "zorder": 2}
    (line,) = axes.plot(samples, [100 * r[key] for r in known], label=words, **style)
    colour = line.get_color()
    if all(r.get(f"{key}/{end}") is not None for r in known for end in ("low", "high")):
        low, high = ([100 * r[f"{key}/{end}"] for r in known] for end in ("low", "high"))
        if len(known) > 1:
            axes.fill_between(samples, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            axes.vlines(samples, low, high, color=colour, alpha=0.4)
    chance = next((r[f"{key}/chance"] for r in known if r.get(f"{key}/chance") is not None), None)
    if chance is not None:
        axes.axhline(100 * chance, color=colour, linestyle=":", linewidth=1)


def draw(folder: Path) -> Path:
    """Draw loss and held-out results against samples seen into `learning_curve.png`.

    Bands are 95 % intervals, and dotted lines what guessing gives.

    Raises:
        ImportError: matplotlib (extra `report`) is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = _figure(read(folder), folder.name)
    path = folder / "learning_curve.png"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a run's name, which the font lacks: the picture is the curve
        figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _figure(records: list[dict[str, Any]], title: str) -> Any:
    """Above the training objective, below the held-out scores."""
    import matplotlib.pyplot as plt

    training = [r for r in records if "objective/objective" in r]
    tests = [r for r in records if any(key.startswith("eval/") for key in r)]
    keys = sorted({key for r in tests for key in r if key.startswith("eval/") and _is_drawn(key)})
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 7 + 0.16 * len(keys)), sharex=True, height_ratios=(2, 3), layout="constrained"
    )
    above.plot(
        [r["samples"] for r in training], [r["objective/objective"] for r in training], color="black", linewidth=1
    )
    above.set_ylabel("training objective")
    for key in keys:
        _draw_score(below, key, [r for r in tests if r.get(key) is not None])
    below.set_ylabel("held-out score, %")
    below.set_xlabel("samples seen")
    if keys:
        below.plot([], [], color="gray", linestyle=":", linewidth=1, label="chance")
        figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    above.set_title(title)
    return figure


def draw_if_possible(folder: Path) -> tuple[Path | None, str]:
    """Draw; where the picture is, or None, and the words that say so or what to install."""
    try:
        path = draw(folder)
        return path, f"learning curve {path}"
    except ImportError:
        return None, "learning curve not drawn: matplotlib is missing (pip install 'amclr_scale[report]')"
