"""When a run is saved, and how: every rank at the same step, written beside training, made valid once all have written.

After every step the ranks agree in one small all-reduce: has any of them been sent a signal, is the time up, is a save
due, has every one of them finished writing the last one. So a signal to a single rank ends all of them at one step,
and no background thread ever talks to another rank.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from amclr_scale.checkpoint import files, state
from amclr_scale.checkpoint.delivery import Delivery
from amclr_scale.checkpoint.files import CHECKPOINTS, Written
from amclr_scale.checkpoint.resume import Found
from amclr_scale.checkpoint.signals import Signals, StoppedError, UnsavedError
from amclr_scale.config.load import recipe_hash
from amclr_scale.config.schema import Config
from amclr_scale.data.tokenizers import Tokenizer
from amclr_scale.distributed.process_group import gather_objects
from amclr_scale.engine.batch_plan import Plan, Position
from amclr_scale.engine.hooks import Hook
from amclr_scale.engine.teacher import Teacher
from amclr_scale.metrics.best import BestSoFar
from amclr_scale.metrics.log import RunLog
from amclr_scale.metrics.run_folder import installed_packages
from amclr_scale.similarity import all_sum


class _Writing:
    """A snapshot on its way to the disk."""

    def __init__(self, snapshot: state.Snapshot, folder: Path, step: int, taken: float):
        self.step, self.bytes, self.taken, self.seconds = step, snapshot.bytes, taken, 0.0
        self.files: list[Written] = []
        self.error = ""

        def write() -> None:
            began = time.perf_counter()
            try:
                self.files = snapshot.write(folder)
            except Exception as error:  # whatever it is, this rank's part is not there
                self.error = str(error) or type(error).__name__
            self.seconds = time.perf_counter() - began

        self._thread = threading.Thread(target=write, name="checkpoint writer")
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()


class Checkpointer(Hook):
    """Saves the run when it is time to; the last of its hooks, so that it saves what the others have done.

    Args:
        folder: the run's.
        fingerprint: of the data.
        tokenizer: that captions go through; saved with every checkpoint.
        hooks: those whose state is saved.
        scores: of the evaluations so far, which they are added to before this hook is told of a step.
        found: what the run goes on from.
        teacher: the run's; saved with the rest.
        delivery: to the node that keeps the run, where not all ranks see its folder.

    Attributes:
        whole: the step of the newest checkpoint that is whole.
        held: says which step must not be removed, because somebody reads its checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        plan: Plan,
        *,
        engine: Any,
        objective: nn.Module,
        fingerprint: str,
        tokenizer: Tokenizer,
        log: RunLog,
        signals: Signals,
        device: torch.device,
        hooks: Sequence[Hook] = (),
        scores: BestSoFar | None = None,
        found: Found | None = None,
        teacher: Teacher | None = None,
        delivery: Delivery | None = None,
    ):
        self.delivery, self._away = delivery, bool(delivery and delivery.away)
        self.folder, self.config, self.plan = folder / CHECKPOINTS, config, plan
        self.engine, self.objective, self.fingerprint, self.teacher = engine, objective, fingerprint, teacher
        self.log, self.signals, self.device, self.hooks = log, signals, device, hooks
        self.number = found.number if found else 0
        self.held: Callable[[], int | None] = lambda: None
        self.rank = int(engine.global_rank)
        self.tokenizer, self._tokenizer_files = tokenizer.fingerprint(), tokenizer.files()
        self.scores = scores or BestSoFar()
        self._writing: _Writing | None = None
        self._saved_at = time.monotonic()
        self._step = self.whole = found.step(config) if found else 0  # done, and of the newest whole checkpoint
        self._failures = 0  # in a row

    def after_step(self, done: Position) -> None:
        """Save if it is time to.

        Raises:
            StoppedError: a signal or train.max_hours; everything is saved.
            UnsavedError: a checkpoint could not be written, and checkpoint.on_failure is stop, or it was the last of
                checkpoint.max_failures in a row, or the run is to end early.
        """
        self._step = done.step
        settings = self.config.checkpoint
        limit, minutes = self.config.train.max_hours, settings.every_minutes
        signalled, late, due, writing, best = self._agree(
            bool(self.signals.received),
            limit is not None and self.signals.hours() >= limit,
            minutes is not None and (time.monotonic() - self._saved_at) / 60 >= minutes,
            self._writing is not None and not self._writing.done,
            self.rank == 0 and self._best() == done.step,
        )
        if self._writing is not None and not writing:
            self._finish()
        every = settings.every_samples
        crossed = every is not None and self.plan.reaches(done, every)
        due = due and not writing  # one that only the clock asks for can wait for the writer
        if not (signalled or late or due or crossed or best or done.last):
            return
        self._save(done.step)
        if done.last or signalled or late:
            self._finish()
            saved = self.whole == done.step
            self.signals.saves = not saved and not done.last  # from here on there is nothing to lose
        if signalled or (late and not done.last):
            if self.delivery:
                self.delivery.pass_on_request()
            if not saved:
                raise UnsavedError(f"checkpoint: step {done.step} could not be saved, and the run was asked to end")
            why = (
                (self.signals.received or "a signal came") if signalled else f"train.max_hours: {limit} hours are over"
            )
            raise StoppedError(f"{why}; saved after step {done.step} in {self.folder.parent}; go on with resume=auto")

    def _agree(self, *mine: bool) -> list[bool]:
        """Whether any rank says so, one by one."""
        return [bool(n) for n in all_sum(torch.tensor(mine, dtype=torch.float32, device=self.device)).tolist()]

    def _save(self, done: int) -> None:
        self._finish()
        began = time.perf_counter()
        here = files.staging(self.folder, done)
        problem = ""
        if self.rank == 0 or self._away:
            try:
                self.log.sync()
                here.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                problem = str(error)
        if self._agree(bool(problem))[0]:
            self._failed(done, problem or "a rank cannot make the folder")
            return
        self.number += 1
        snapshot = state.take(
            self.engine, self.objective, self._state(done), self.device, self._tokenizer_files, self.hooks, self.teacher
        )
        self._writing = _Writing(snapshot, here, done, time.perf_counter() - began)
        self._saved_at = time.monotonic()
        if not self.config.checkpoint.asynchronous:
            self._finish()

    def _state(self, done: int) -> dict[str, Any]:
        return {
            "step": done,
            "samples": done * self.plan.global_batch_size,
            "total_steps": self.plan.total_steps,
            "number": self.number,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "recipe": recipe_hash(self.config),
            "config": self.config.model_dump(mode="json"),
            "data_fingerprint": self.fingerprint,
            "tokenizer_fingerprint": self.tokenizer,
            "num_samples": self.plan.samples_per_epoch,
            "packages": installed_packages(),
        }

    def _finish(self) -> None:
        """Wait until all ranks have written, and make the checkpoint valid."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        began = time.perf_counter()
        writing.wait()
        everyone = gather_objects((writing.files, writing.error, writing.bytes))
        errors = [f"rank {rank}: {error}" for rank, (_, error, _) in enumerate(everyone) if error]
        problem, sent, sending = "; ".join(errors), 0, time.perf_counter()
        if self.delivery and not problem:
            here = files.staging(self.folder, writing.step)
            sent, problem = self.delivery.collect(here, [written for written, _, _ in everyone])
        sending = time.perf_counter() - sending
        if self.rank == 0 and not problem:
            try:
                files.commit(self.folder, writing.step, [file for written, _, _ in everyone for file in written])
            except OSError as error:
                problem = f"rank 0: {error}"
        if self._agree(bool(problem))[0]:
            self._failed(writing.step, problem or "rank 0 cannot complete it")
            return
        self.whole, self._failures = writing.step, 0
        if self._away:
            self._note(writing.step)
        if self.rank == 0:
            self._thin_out()
        size, waited = sum(size for _, _, size in everyone), time.perf_counter() - began
        carried = f"{sent / 2**20:.1f} MiB of them sent in {sending:.2f} s, " if sent else ""
        self.log.say(
            f"checkpoint {files.name_of(writing.step)}: {size / 2**20:.1f} MiB, copied in {writing.taken:.2f} s, "
            f"written in {writing.seconds:.2f} s, {carried}training waited {writing.taken + waited:.2f} s"
        )
        seconds = {"seconds": writing.taken + waited, "copy_seconds": writing.taken, "write_seconds": writing.seconds}
        seconds |= {"sent_bytes": sent, "send_seconds": sending} if sent else {}
        record = {"of_step": writing.step, "bytes": size, **seconds}
        place = {"step": self._step, "samples": self._step * self.plan.global_batch_size}
        self.log.write({**place, **{f"checkpoint/{key}": value for key, value in record.items()}})

    def _best(self) -> int | None:
        """The step that scored best in what `checkpoint.best` names."""
        return self.scores.step(self.config.checkpoint.best) if self.config.checkpoint.best else None

    def on_end(self) -> dict[str, float]:
        """The last evaluation comes after the last save, and may have made it the best."""
        if self.rank == 0 and self.config.checkpoint.best:
            self._thin_out()
        return {}

    def _thin_out(self) -> None:
        best, settings = self._best(), self.config.checkpoint
        try:
            if best is not None:
                files.point_at_best(self.folder, best)
            files.thin_out(self.folder, settings.keep, settings.keep_every, (best, self.held()))
        except OSError as error:  # the new one is whole all the same
            self.log.say(f"checkpoint: an older one could not be removed ({error}); training goes on")

    def _note(self, step: int) -> None:
        """Leave word on this rank's node of a checkpoint that is not here."""
        assert self.delivery
        try:
            self.delivery.note(step)
            files.staging(self.folder, step).rmdir()
        except OSError:  # it is but a word; and another rank of the node has removed the folder
            return

    def _failed(self, step: int, problem: str) -> None:
        if self.rank == 0 or self._away:
            files.clean(self.folder)
        words = f"checkpoint: step {step} could not be written ({problem}); earlier checkpoints are untouched"
        self._failures += 1
        settings, last = self.config.checkpoint, self._step == self.plan.total_steps
        if settings.on_failure == "stop" and not last:  # the end still has weights and results to leave
            raise UnsavedError(words)
        if self._failures == settings.max_failures and not last:
            raise UnsavedError(
                f"{words}\ncheckpoint.max_failures: {self._failures} in a row could not be written, so the run ends; "
                "make room and go on with resume=auto"
            )
        self._saved_at = time.monotonic()
        self.log.say(f"{words}; training goes on")

    def __enter__(self) -> Self:
        """Clear away what an interrupted run left half-done, and what is newer than the step this one goes on from."""
        if self.rank == 0:
            files.clean(self.folder)
            files.set_aside_after(self.folder, self._step)
        return self

    def __exit__(self, *error: object) -> None:
        """Let the writer come to its end; a checkpoint that others may not have finished stays invisible.

        Raises:
            UnsavedError: the run has come to its end, and its last step is not saved.
        """
        if self._writing is not None:
            self._writing.wait()
        if error[0] is None and self.whole < self._step == self.plan.total_steps:
            raise UnsavedError(
                f"checkpoint: the last step, {self._step}, could not be saved (the reason is above); weights and "
                f"results are in {self.folder.parent}, and the newest checkpoint is of step {self.whole}"
            )
