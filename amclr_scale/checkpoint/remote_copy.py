"""The hook of a run that is kept in a store too: tells the thread of new checkpoints, and waits for it in the end."""

import time
from pathlib import Path
from typing import Self

import torch

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.checkpointer import Checkpointer
from amclr_scale.checkpoint.mirror import Mirror, Uploaded, remote_of
from amclr_scale.checkpoint.remote import RemoteError
from amclr_scale.checkpoint.signals import StoppedError, UnsavedError
from amclr_scale.config.schema import Config
from amclr_scale.distributed.process_group import broadcast_object
from amclr_scale.engine.batch_plan import Position
from amclr_scale.engine.hooks import Hook
from amclr_scale.errors import AgreedError, UserError
from amclr_scale.similarity import all_sum

_LOOK = 0.2  # seconds between two looks at whether the last upload is done


class RemoteCopy(Hook):
    """After the checkpointer: on rank 0 it has the thread, and the others wait with it in the end.

    Args:
        folder: the run's.
        saver: the run's checkpointer, which keeps what is being uploaded.
    """

    def __init__(self, folder: Path, config: Config, saver: Checkpointer):
        self.folder, self.config, self.saver, self.log = folder, config, saver, saver.log
        self.mirror: Mirror | None = None
        if saver.rank == 0:
            self.mirror = mirror = Mirror(folder, remote_of(config, folder.name), config.checkpoint)
            saver.held = lambda: mirror.held
        self._told = saver.whole

    def __enter__(self) -> Self:
        """Take the store's folder, and bring there what is on the disk already.

        Raises:
            AgreedError: on every rank, another run is there, or it cannot be written.
        """
        words = ""
        if self.mirror:
            try:
                self.mirror.claim()
                self.mirror.wake()
            except UserError as error:
                words = str(error)
            except RemoteError as error:
                words = f"run.remote: {error}; check the address, the permissions and the network"
        if words := broadcast_object(words):
            raise AgreedError(words)
        return self

    def after_step(self, done: Position) -> None:
        """Tell the thread of a new checkpoint, and the log of what the thread has done."""
        if self.mirror is None:
            return
        if self.saver.whole != self._told:
            self._told = self.saver.whole
            self.mirror.wake()
        for seconds in self._tell():
            place = {"step": done.step, "samples": done.samples}
            self.log.write({**place, "checkpoint/upload_seconds": seconds})

    def _tell(self) -> list[float]:
        """Say what the thread has done; how long each upload has taken."""
        seconds = []
        while self.mirror and not self.mirror.news.empty():
            one = self.mirror.news.get()
            if isinstance(one, Uploaded):
                seconds.append(one.seconds)
                self.log.say(
                    f"checkpoint {files.name_of(one.step)}: {one.bytes / 2**20:.1f} MiB are at "
                    f"{self.mirror.remote.url}, in {one.seconds:.2f} s beside training"
                )
            else:
                self.log.say(f"run.remote: {one}; training goes on, and the next checkpoint tries again")
        return seconds

    def __exit__(self, *error: object) -> None:
        """Wait until everything is there, where all ranks have come to the run's end together.

        Raises:
            UnsavedError: it is not.
        """
        if not (error[0] is None or isinstance(error[1], StoppedError | UnsavedError)):
            return
        limit = self.config.run.remote_minutes
        until = time.monotonic() + 60 * limit
        if self.mirror:
            self.mirror.wake()
        while self._any(self.mirror is not None and self.mirror.busy and time.monotonic() < until):
            time.sleep(_LOOK)
        problem = ""
        if self.mirror:
            self._tell()
            late = f"the upload has not ended within run.remote_minutes, {limit:g}"
            problem = late if self.mirror.busy else self.mirror.problem
        if (problem := broadcast_object(problem)) and error[0] is not UnsavedError:
            raise UnsavedError(
                f"run.remote: the last checkpoint or records are not in the store ({problem}); they are in "
                f"{self.folder}: the same command with resume={self.folder} uploads them"
            )

    def _any(self, mine: bool) -> bool:
        return bool(all_sum(torch.tensor([float(mine)], device=self.saver.device)).item())
