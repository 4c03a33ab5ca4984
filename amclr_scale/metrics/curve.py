"""The learning curve of a run, as a picture."""

import json
from pathlib import Path
from typing import Any

from amclr_scale.metrics.scores import score_of


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _is_drawn(key: str) -> bool:
    score = score_of(key)
    return score is not None and score.drawn


def draw(folder: Path) -> Path:
    """Draw loss and held-out results against samples seen into `learning_curve.png`.

    Raises:
        ImportError: matplotlib (extra `report`) is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read(folder)
    training = [r for r in records if "objective/objective" in r]
    tests = [r for r in records if any(key.startswith("eval/") for key in r)]
    keys = sorted({key for r in tests for key in r if key.startswith("eval/") and _is_drawn(key)})
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 3))
    above.plot(
        [r["samples"] for r in training], [r["objective/objective"] for r in training], color="black", linewidth=1
    )
    above.set_ylabel("training objective")
    for key in keys:
        known = [r for r in tests if r.get(key) is not None]
        below.plot(
            [r["samples"] for r in known], [100 * r[key] for r in known], marker="o", markersize=3, label=key[5:]
        )
    below.set_ylabel("held-out score, %")
    below.set_xlabel("samples seen")
    if keys:
        below.legend(fontsize=8, loc="upper left", frameon=False)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    above.set_title(folder.name)
    figure.tight_layout()
    path = folder / "learning_curve.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_if_possible(folder: Path) -> str:
    """Draw, and say where; or say what to install."""
    try:
        return f"learning curve {draw(folder)}"
    except ImportError:
        return "learning curve not drawn: matplotlib is missing (pip install 'amclr_scale[report]')"
