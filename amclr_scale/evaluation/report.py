"""Results of one or several models as JSON and Markdown, and their paired comparisons."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from amclr_scale.evaluation.numbers import Comparison, Number, compare
from amclr_scale.evaluation.table import DETAILS
from amclr_scale.evaluation.temperatures import Histogram

Measured = Mapping[str, Mapping[str, Number]]  # by split, by name


def comparisons(first: Measured, second: Measured, *, resamples: int) -> dict[str, Comparison]:
    """How much better the second model is than the first in every number that both have, item by item."""
    return {
        f"{split}/{name}": compare(numbers[name], second[split][name], resamples=resamples)
        for split, numbers in first.items()
        for name in numbers
        if name in second.get(split, {})
    }


def comparison_lines(found: Mapping[str, Comparison]) -> list[str]:
    """One line per number, in percentage points with the 95 % interval of the difference."""
    return [
        f"{name}: {100 * one.difference:+.2f} [{100 * one.low:+.2f}, {100 * one.high:+.2f}]"
        + (" *" if one.low > 0 or one.high < 0 else "")
        for name, one in found.items()
    ]


def markdown(
    results: Mapping[str, Mapping[str, float]],
    compared: Mapping[str, Mapping[str, Comparison]],
    *,
    precision: Mapping[str, str] | None = None,
    prompts: Sequence[str] = (),
) -> str:
    """A table with one row per number and one column per model, the first prompts, then the comparisons.

    Args:
        precision: what each model computed in.
        prompts: the first ones of each split, in words.
    """
    models = [f"{name} ({precision[name]})" if precision else name for name in results]
    names = [name for name in dict.fromkeys(n for found in results.values() for n in found) if not _is_detail(name)]
    lines = ["# Evaluation", "", "Shares in percent with their 95 % intervals; the rest as it is.", ""]
    lines += ["| | " + " | ".join(models) + " | chance |", "|---" * (len(models) + 2) + "|"]
    for name in names:
        chance = next((found[f"{name}/chance"] for found in results.values() if f"{name}/chance" in found), None)
        cells = [_cell(found, name) for found in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {'' if chance is None else f'{100 * chance:.2f}'} |")
    lines += ["", *(f"- {words}" for words in prompts)] if prompts else []
    for pair, found in compared.items():
        lines += ["", f"## {pair}", "", "Percentage points, paired over items; * where the interval excludes zero.", ""]
        lines += [f"- {line}" for line in comparison_lines(found)]
    return "\n".join(lines) + "\n"


def _is_detail(name: str) -> bool:
    return name.rpartition("/")[2] in DETAILS


def _cell(found: Mapping[str, float], name: str) -> str:
    if name not in found:
        return ""
    if f"{name}/stderr" not in found:
        return f"{found[name]:.6g}"
    interval = (
        f" [{100 * found[f'{name}/low']:.1f}, {100 * found[f'{name}/high']:.1f}]" if f"{name}/low" in found else ""
    )
    return f"{100 * found[name]:.1f}{interval}"


def write(
    folder: Path,
    results: Mapping[str, Mapping[str, float]],
    compared: Mapping[str, Mapping[str, Comparison]],
    temperatures: Mapping[str, Mapping[str, Histogram]] | None = None,
    *,
    precision: Mapping[str, str] | None = None,
    prompts: Sequence[str] = (),
) -> None:
    """results.json and results.md in a folder.

    Args:
        temperatures: of every sample, by model and side.
        precision, prompts: see `markdown`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = {pair: {name: vars(one) for name, one in found.items()} for pair, found in compared.items()}
    learned = temperatures or {}
    spread = {name: {side: vars(one) for side, one in sides.items()} for name, sides in learned.items()}
    content = {
        "results": results, "comparisons": listed, "temperatures": spread, "precision": precision or {},
        "prompts": list(prompts),
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    text = markdown(results, compared, precision=precision, prompts=prompts)
    (folder / "results.md").write_text(text + temperature_sections(learned), "utf-8")


def temperature_sections(temperatures: Mapping[str, Mapping[str, Histogram]]) -> str:
    """Histograms as Markdown, one section per model."""
    return "".join(
        "\n".join(["", f"## {name}: temperatures", "", "```", *histogram_lines(sides), "```", ""])
        for name, sides in temperatures.items()
    )


def histogram_lines(sides: Mapping[str, Histogram]) -> list[str]:
    """Histograms as text, one after the other."""
    return [line for side, one in sides.items() for line in one.lines(side)]
