"""Cells that others read features of run first; then the study embeds its training data with them.

features/CELL-RECIPE/ holds image.npy, text.npy and communities-8-5-20.npy; logs/CELL.features.log, what was said.
"""

import contextlib
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from amclr_scale.study.planning.features import IMAGE, TEXT, Features
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.run import FOLLOW, Outcome

Say = Callable[[str], None]


def needed(chosen: Sequence[Planned], cells: Sequence[Planned]) -> list[Planned]:
    """The cells that chosen ones read features of."""
    names = {cell.features.of for cell in chosen if cell.features}
    return [cell for cell in cells if cell.name in names]


def make_features(
    folder: StudyFolder, chosen: Sequence[Planned], cells: Sequence[Planned], device: str, say: Say,
    until: float = math.inf,
) -> Outcome:  # fmt: skip
    """Make what chosen cells have yet to read of others, as far as those are finished and it is not there.

    A signal ends it at once, and what was half made is made anew; by time.monotonic(), nothing begins after `until`.
    """
    tried: set[tuple[Path, ...]] = set()
    by_name = {cell.name: cell for cell in cells}
    for cell in chosen:
        features = cell.features
        if features is None or features.made or tuple(features.files) in tried:
            continue
        if folder.is_finished(cell) or not folder.is_finished(by_name[features.of]):
            continue
        tried.add(tuple(features.files))
        features.folder.mkdir(parents=True, exist_ok=True)
        log = folder.logs / f"{features.of}.features.log"
        for words in commands(folder, cell, features, device):
            try:
                code = _run(words, log, until)
            except _AskedError as asked:
                say(f"{asked}: features of {features.of} are not made yet; the same command goes on")
                return Outcome(0, (), True)
            if code:
                say(f"features of {features.of}: failed with exit code {code}; {log}")
                break
        else:
            say(f"features of {features.of}: {', '.join(file.name for file in features.files)} in {features.folder}")
    return Outcome(0, (), False)


class _AskedError(Exception):
    """To end, by whom."""


def _run(words: list[str], log: Path, until: float) -> int:
    """The exit code of a command."""
    if time.monotonic() >= until:
        raise _AskedError("--minutes")
    with log.open("ab") as file, _asking():
        file.write(f"$ {' '.join(words)}\n".encode())
        file.flush()
        return subprocess.run(
            [*FOLLOW, *words], check=False, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        ).returncode  # an exception on the way kills it


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """SIGTERM and Ctrl-C are `_AskedError`."""

    def asked(number: int, _: FrameType | None) -> None:
        raise _AskedError(signal.Signals(number).name)

    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def parted(folder: StudyFolder, cells: Sequence[Planned]) -> tuple[list[Planned], list[Planned]]:
    """Those that have what they read or have read it, and those that lack it."""
    there = [cell for cell in cells if cell.features is None or cell.features.made or folder.is_finished(cell)]
    return there, [cell for cell in cells if cell not in there]


def device_of(plan: StudyPlan) -> str:
    """Where features are computed: where cells run, if this machine can."""
    if plan.execution.device == "cpu":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
