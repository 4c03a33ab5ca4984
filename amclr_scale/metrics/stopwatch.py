"""Where the seconds before the first step go. Imports no torch, so that it can time that import."""

import time

import psutil


class Stopwatch:
    """Laps since the process was started. `lap("imports")` ends one and begins the next."""

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Book the seconds since the last lap under `name`."""
        now = time.time()
        self.laps[name] = now - self._last
        self._last = now

    def __str__(self) -> str:
        total = sum(self.laps.values())
        return f"start-up {total:.1f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.laps.items())
