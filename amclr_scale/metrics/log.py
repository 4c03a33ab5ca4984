"""What a run says: one JSON object per logged step, one line on the console, and to trackers what they are sent."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from amclr_scale.config.schema import Config
from amclr_scale.metrics.trackers import Tracker, open_trackers


def _plain(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class RunLog:
    """The voice of rank 0; on other ranks every method does nothing.

    On a terminal a progress line stays below the lines; elsewhere there are plain lines only.
    """

    def __init__(self, folder: Path, config: Config, *, speaks: bool, total_steps: int):
        self.speaks, self.folder, self.config, self.total_steps = speaks, folder, config, total_steps
        self._trackers: list[Tracker] = []
        self._step = 0
        self._progress: Progress | None = None

    def __enter__(self) -> "RunLog":
        """Open the files; nothing is said or written before."""
        if not self.speaks:
            return self
        folder, config = self.folder, self.config
        self.console = Console(highlight=False, soft_wrap=True)
        self._file = (folder / "metrics.jsonl").open("a")
        self._trackers = open_trackers(folder, config)
        if sys.stdout.isatty():
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console)
            self._task = self._progress.add_task("training", total=self.total_steps)
            self._progress.start()
        return self

    def say(self, text: Any) -> None:
        """A line, or anything rich can print."""
        if self.speaks:
            self.console.print(text)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one JSON object to metrics.jsonl, and send its numbers to the trackers."""
        if not self.speaks:
            return
        clean = {key: _plain(value) if isinstance(value, float) else value for key, value in record.items()}
        self._file.write(json.dumps({"time": round(time.time(), 3), **clean}) + "\n")
        self._file.flush()
        self._step = int(record["step"])
        values = {name: x for name, x in clean.items() if isinstance(x, int | float) and name != "step"}
        for tracker in self._trackers:
            tracker.numbers(values, self._step)

    def picture(self, name: str, path: Path) -> None:
        """Send a picture of the run folder to the trackers, at the step of the last record."""
        for tracker in self._trackers:
            tracker.picture(name, path, self._step)

    def sync(self) -> None:
        """Have all records on the disk, so that no checkpoint is newer than they are."""
        if self.speaks:
            os.fsync(self._file.fileno())

    def step(self, record: Mapping[str, Any], total_steps: int, left: float | None = None) -> None:
        """Write a training record, and say it in one line.

        Args:
            left: seconds until the last step; None: not known yet.
        """
        self.write(record)
        if self.speaks:
            until = "" if left is None else f"  {duration(left)} left"
            self.console.print(
                f"step {record['step']:>6}/{total_steps}  epoch {record['epoch']:6.2f}  "
                f"objective {record['objective/objective']:8.4f}  lr {record['lr']:.2e}  "
                f"grad {record['grad_norm']:8.3f}  scale {record['logit_scale']:6.2f}  "
                f"{record['samples_per_second']:8.1f} samples/s  data wait {record['data_wait_share']:4.0%}  "
                f"{record['peak_memory_gib']:.2f} GiB{until}"
            )

    def advance(self, steps_done: int) -> None:
        """Move the progress line."""
        if self._progress is not None:
            self._progress.update(self._task, completed=steps_done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.speaks:
            return
        if self._progress is not None:
            self._progress.stop()
        for tracker in self._trackers:
            tracker.close(failed=error is not None)
        self._file.close()
