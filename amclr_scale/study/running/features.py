"""Cells that others read features of run first; then the study embeds its training data with them.

features/CELL-RECIPE/ holds image.npy, text.npy and communities-8-5-20.npy; logs/CELL.features.log, what was said.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from amclr_scale.study.planning.cells import Planned
from amclr_scale.study.planning.features import IMAGE, TEXT, Features
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.run import FOLLOW

Say = Callable[[str], None]


def needed(chosen: Sequence[Planned], cells: Sequence[Planned]) -> list[Planned]:
    """The cells that chosen ones read features of."""
    names = {cell.features.of for cell in chosen if cell.features}
    return [cell for cell in cells if cell.name in names]


def make_features(
    folder: StudyFolder, chosen: Sequence[Planned], cells: Sequence[Planned], device: str, say: Say
) -> None:
    """Make what chosen cells read of others, as far as those are finished and it is not there."""
    tried: set[tuple[Path, ...]] = set()
    by_name = {cell.name: cell for cell in cells}
    for cell in chosen:
        features = cell.features
        if features is None or features.made or tuple(features.files) in tried:
            continue
        if not folder.is_finished(by_name[features.of]):
            continue
        tried.add(tuple(features.files))
        features.folder.mkdir(parents=True, exist_ok=True)
        log = folder.logs / f"{features.of}.features.log"
        for words in commands(folder, cell, features, device):
            with log.open("ab") as file:
                file.write(f"$ {' '.join(words)}\n".encode())
                file.flush()
                made = subprocess.run(
                    [*FOLLOW, *words], check=False, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
                )
            if made.returncode:
                say(f"features of {features.of}: failed with exit code {made.returncode}; {log}")
                break
        else:
            say(f"features of {features.of}: {', '.join(file.name for file in features.files)} in {features.folder}")


def commands(folder: StudyFolder, cell: Planned, features: Features, device: str) -> Iterator[list[str]]:
    """The command lines that make the files that are not there."""
    start, data = [sys.executable, "-m", "amclr_scale"], str(cell.config.data.train)
    image, text = (str(features.folder / name) for name in (IMAGE, TEXT))
    for side, out in (("image", image), ("text", text)):
        if not Path(f"{out}.json").is_file():
            of = [str((folder.runs / features.of).absolute()), "--shards", data, "--side", side]
            yield [*start, "embed", *of, "--device", device, "--out", out]
    if (how := features.communities) and not features.made:
        numbers = ["--size", str(how.size), "--skip", str(how.skip), "--neighbours", str(how.neighbours)]
        out = str(features.files[-1])
        yield [*start, "shards", "communities", data, "--image", image, "--text", text, *numbers, "--out", out]


def parted(cells: Sequence[Planned]) -> tuple[list[Planned], list[Planned]]:
    """Those that have what they read, and those that lack it."""
    there = [cell for cell in cells if cell.features is None or cell.features.made]
    return there, [cell for cell in cells if cell not in there]


def device_of(plan: StudyPlan) -> str:
    """Where features are computed: where cells run, if this machine can."""
    if plan.execution.device == "cpu":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
