"""How far a study is, and how long it will still take, from what its cells took so far.

The time of a cell is predicted from finished cells: of the same arm and batch size, else of the same arm, else of all
of them in proportion to encoder work. Nothing is said before a cell has run.
"""

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running.folder import StudyFolder


class Rates:
    """Seconds per unit of work (a sample through both towers once), measured on this study's finished cells."""

    def __init__(self, folder: StudyFolder, cells: Sequence[Planned]):
        self.folder = folder
        self.measured: dict[str, float] = {}  # cell -> seconds of all its attempts
        self._spent: dict[str, float] = {}  # on cells that are not finished, too
        for attempt in folder.recorded():
            self._spent[attempt["cell"]] = self._spent.get(attempt["cell"], 0.0) + float(attempt["seconds"])
        self.cells = list(cells)
        for cell in cells:
            if cell.name in self._spent and folder.is_finished(cell):
                self.measured[cell.name] = self._spent[cell.name]

    def add(self, cell: Planned, seconds: float) -> None:
        """The last attempt at a cell, which is finished now."""
        self._spent[cell.name] = self._spent.get(cell.name, 0.0) + seconds
        self.measured[cell.name] = self._spent[cell.name]

    def predict(self, cell: Planned) -> float | None:
        """Seconds for a whole cell; None while nothing is known."""
        known = [one for one in self.cells if one.name in self.measured]
        same_arm = [one for one in known if one.arm == cell.arm]
        same_batch = [one for one in same_arm if one.global_batch_size == cell.global_batch_size]
        like = same_batch or same_arm or known
        if not like:
            return None
        work = sum(one.samples * one.encoder_cost for one in like)
        return sum(self.measured[one.name] for one in like) / work * cell.samples * cell.encoder_cost


class Progress:
    """A bar on a terminal, a line per finished cell elsewhere.

    Args:
        folder: of the study.
        cells: all of them, finished ones too.
        jobs: cells at once.
    """

    def __init__(self, folder: StudyFolder, cells: Sequence[Planned], jobs: int):
        self.folder, self.cells, self.jobs = folder, list(cells), jobs
        self.rates = Rates(folder, cells)
        self.done = {cell.name for cell in cells if folder.is_finished(cell)}
        self._bar: Bar | None = None
        self._shown = 0.0

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            count, left = TextColumn("{task.completed}/{task.total} cells"), TextColumn("{task.fields[left]}")
            # refreshed by hand: cells are started from the only thread, so that they end with it
            self._bar = Bar(count, BarColumn(), left, console=Console(highlight=False), auto_refresh=False)
            self._task = self._bar.add_task("", total=len(self.cells), completed=len(self.done), left="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.update(self._task, completed=len(self.done), left="")
            self._bar.refresh()
            self._bar.stop()

    def finished(self, cell: Planned) -> None:
        """Another cell is."""
        self.done.add(cell.name)

    def line(self, cell: Planned, seconds: float, running: Sequence[tuple[Planned, float]]) -> str:
        """What is said when a cell is finished, and which others run since when."""
        self.rates.add(cell, seconds)
        done = len(self.done | {cell.name})
        return f"{done}/{len(self.cells)} {cell.name}: {duration(seconds)}; {self.left(running)}"

    def show(self, running: Sequence[tuple[Planned, float]]) -> None:
        """Update the bar: (cell, started at) of those that run."""
        if self._bar and time.time() - self._shown > 2:
            self._shown = time.time()
            self._bar.update(self._task, completed=len(self.done), left=self.left(running))
            self._bar.refresh()

    def left(self, running: Sequence[tuple[Planned, float]]) -> str:
        """Time left in words."""
        seconds = 0.0
        now = {cell.name: started for cell, started in running}
        for cell in self.cells:
            if cell.name in self.done or cell.name in self.rates.measured:
                continue
            predicted = self.rates.predict(cell)
            if predicted is None:
                return "time left: unknown until a cell has finished"
            seconds += max(0.0, predicted - (time.time() - now[cell.name] if cell.name in now else 0.0))
        return f"about {duration(seconds / self.jobs)} left"


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min, 3.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5940 else f"{seconds / 3600:.1f} h"
