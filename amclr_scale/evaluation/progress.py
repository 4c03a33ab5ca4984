"""How far an evaluation is: a bar on a terminal, a line every few seconds elsewhere, nothing on other ranks."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between two lines


class EvaluationProgress:
    """Counts what a model encodes while it is entered.

    Args:
        name: of the model.
        total: images and captions that this rank will encode.
        speaks: whether this rank says anything.
        console: where; default: standard error.
    """

    def __init__(self, name: str, total: int, *, speaks: bool = True, console: Console | None = None):
        self.name, self.total, self.done, self.speaks = name, total, 0, speaks
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        if speaks and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
        self._said = self._began = time.monotonic()

    def __enter__(self) -> "EvaluationProgress":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def more(self, total: int) -> None:
        """There is more to encode than was said."""
        self.total += total
        if self._bar:
            self._bar.update(self._task, total=self.total)

    def watch(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, counted."""

        def counted(**inputs: Any) -> Any:
            out = encode(**inputs)
            self._advance(sum(len(inputs[kind][0]) for kind in ("images", "texts") if inputs.get(kind)))
            return out

        return counted

    def _advance(self, count: int) -> None:
        self.done += count
        if self._bar:
            self._bar.update(self._task, completed=min(self.done, self.total))
        elif self.speaks and time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            share = min(1.0, self.done / max(1, self.total))
            seconds = self._said - self._began
            words = f"{self.name}: {self.done:,} of {self.total:,} encoded ({share:.0%}) in {seconds:.0f} s"
            self._console.print(words, highlight=False, soft_wrap=True)
