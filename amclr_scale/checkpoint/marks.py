"""Small files of a run folder by which processes on other nodes know how the run stands. Imports no torch."""

import contextlib
import json
import os
import secrets
from pathlib import Path

from amclr_scale.checkpoint.files import replace_text
from amclr_scale.errors import UserError

RESULT = "evaluation.json"  # the sign of a finished run
ASKED = "asked_to_end"  # written when a supervisor is asked to end all
ELSEWHERE = "kept_elsewhere.json"  # run.shared=false: on the nodes that keep nothing, which one does


class Changes:
    """Whether a file has been written since this object was made, here or by another node, whatever the clocks say."""

    def __init__(self, path: Path):
        self.path = path
        self._before = self._stamp()

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            with self.path.open("rb") as file:  # opening has a network file system look again
                found = os.fstat(file.fileno())
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    @property
    def happened(self) -> bool:
        """It is there, and another than it was."""
        now = self._stamp()
        return now is not None and now != self._before

    def tell(self) -> None:
        """Write it, for the other nodes' supervisors."""
        with contextlib.suppress(OSError):  # there is no run yet
            self.path.write_text(secrets.token_hex(8))


def note_elsewhere(run: Path, host: str, step: int) -> None:
    """Leave word on a node of how far the run is whose checkpoints another node keeps.

    Raises:
        OSError: it cannot be written.
    """
    replace_text(run / ELSEWHERE, json.dumps({"host": host, "step": step}) + "\n")


def step_elsewhere(run: Path) -> tuple[str, int]:
    """The host that keeps this run, and the step of its newest checkpoint; ("", 0) where nothing is said."""
    try:
        found = json.loads((run / ELSEWHERE).read_text("utf-8"))
        return str(found["host"]), int(found["step"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "", 0


def refuse_elsewhere(run: Path) -> None:
    """Raise `UserError` where a run would begin again beside its checkpoints, which are on another node."""
    host, step = step_elsewhere(run)
    if host:
        raise UserError(
            f"run.shared: the checkpoints of {run} are on {host}, up to step {step:,}, and rank 0 is on another node "
            f"now; start rank 0 on {host}, or copy the folder from there and remove {ELSEWHERE} from it here"
        )
