"""Results of one or several models as JSON and Markdown, and their paired comparisons."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from amclr_scale.errors import UserError
from amclr_scale.evaluation.numbers import Comparison, Number, compare
from amclr_scale.evaluation.table import DETAILS
from amclr_scale.evaluation.temperatures import Histogram
from amclr_scale.metrics.scores import is_share, words_of

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
    """One line per number with the 95 % interval of the difference; shares in percentage points."""

    def written(name: str, value: float) -> str:
        return f"{100 * value:+.2f}" if is_share(name) else f"{value:+.4g}"

    return [
        f"{name}: {written(name, one.difference)} [{written(name, one.low)}, {written(name, one.high)}]"
        + (" *" if one.low > 0 or one.high < 0 else "")
        for name, one in found.items()
    ]


def markdown(
    results: Mapping[str, Mapping[str, float]],
    compared: Mapping[str, Mapping[str, Comparison]],
    *,
    precision: Mapping[str, str] | None = None,
    prompts: Sequence[str] = (),
    suites: Sequence[str] = (),
) -> str:
    """A table with one row per number and one column per model, the first prompts, then the comparisons.

    Args:
        precision: what each model computed in.
        prompts: the first ones of each split, in words.
        suites: what was measured by, by name.
    """
    models = [f"{name} ({precision[name]})" if precision else name for name in results]
    names = [name for name in dict.fromkeys(n for found in results.values() for n in found) if not _is_detail(name)]
    lines = [
        f"# Evaluation{': ' * bool(suites)}{', '.join(suites)}",
        "",
        "Shares in percent with their 95 % intervals; the rest as it is.",
        "",
    ]
    lines += ["| | " + " | ".join(models) + " | chance |", "|---" * (len(models) + 2) + "|"]
    for name in names:
        cells = [_cell(found, name) for found in results.values()]
        guessed = next((words for found in results.values() if (words := _chance(found, name))), "")
        lines.append(f"| {name} | {' | '.join(cells)} | {guessed} |")
    lines += ["", *(f"- {words}" for words in prompts)] if prompts else []
    for pair, found in compared.items():
        lines += ["", f"## {pair}", "", "Percentage points, paired over items; * where the interval excludes zero.", ""]
        lines += [f"- {line}" for line in comparison_lines(found)]
    return "\n".join(lines) + "\n"


def _is_detail(name: str) -> bool:
    return name.rpartition("/")[2] in DETAILS


def _cell(found: Mapping[str, float], name: str) -> str:
    """A number with its interval."""
    if name not in found:
        return ""
    ends = [found[f"{name}/{end}"] for end in ("low", "high") if f"{name}/{end}" in found]
    share = is_share(name, found)
    one, *rest = [f"{100 * value:.1f}" if share else f"{value:.6g}" for value in (found[name], *ends)]
    return f"{one} [{', '.join(rest)}]" if rest else one


def _chance(found: Mapping[str, float], name: str) -> str:
    """What guessing gives, where it is known."""
    if f"{name}/chance" not in found:
        return ""
    value = found[f"{name}/chance"]
    return f"{100 * value:.2f}" if is_share(name, found) else f"{value:.4g}"


def in_words(results: Mapping[str, float]) -> list[str]:
    """The results of one model as a table of Markdown, a line per number."""
    rows = []
    for name in results:
        if not _is_detail(name):
            split, percent = name.rpartition("/")[0], ", %" if is_share(name, results) else ""
            rows.append(f"| {split} | {words_of(name)}{percent} | {_cell(results, name)} | {_chance(results, name)} |")
    return ["| held out | measure | value | chance |", "|---|---|---|---|", *rows]


def made(folder: Path) -> None:
    """Make the folder of the results, before there are any.

    Raises:
        UserError: it cannot be made, or not be written.
    """
    wanted = f"--output: expected a folder that can be written, got {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{wanted}: {error.strerror}; name another place") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{wanted}: no permission; name another place")


def write(
    folder: Path,
    results: Mapping[str, Mapping[str, float]],
    compared: Mapping[str, Mapping[str, Comparison]],
    temperatures: Mapping[str, Mapping[str, Histogram]] | None = None,
    *,
    precision: Mapping[str, str] | None = None,
    prompts: Sequence[str] = (),
    suites: Sequence[str] = (),
) -> None:
    """results.json and results.md in a folder.

    Args:
        temperatures: of every sample, by model and side.
        precision, prompts, suites: see `markdown`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = {pair: {name: vars(one) for name, one in found.items()} for pair, found in compared.items()}
    learned = temperatures or {}
    spread = {name: {side: vars(one) for side, one in sides.items()} for name, sides in learned.items()}
    content = {
        "results": results, "comparisons": listed, "temperatures": spread, "precision": precision or {},
        "prompts": list(prompts), "suites": list(suites),
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    text = markdown(results, compared, precision=precision, prompts=prompts, suites=suites)
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
