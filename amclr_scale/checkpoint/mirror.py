"""`run.remote`: a run's folder kept in an object store too, brought up to date beside training.

Rank 0 has a thread for it (the run's folder is on a file system that it sees whole). Whenever a checkpoint is whole on
the disk, the thread uploads it, the newest first, and then the run's other files; older ones are removed there by the
rules of the disk, once a newer one is whole there, and what the run has gone back from is set aside there too. A
checkpoint that is being uploaded stays on the disk meanwhile.
What fails is said and tried again with the next checkpoint. The end of a run waits for the thread. Imports no torch.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.files import BEST, CHECKPOINTS, LATEST, MANIFEST, STATE
from amclr_scale.checkpoint.remote import ENVIRONMENT, HOLDER, RemoteError, RemoteRun, identity_in, is_record
from amclr_scale.config.schema import Checkpoint, Config
from amclr_scale.errors import UserError
from amclr_scale.metrics.run_folder import ASIDE


def remote_of(config: Config, name: str) -> RemoteRun:
    """The folder in the store that `run.remote` means for a run of this name."""
    return RemoteRun(f"{str(config.run.remote).rstrip('/')}/{name}", "run.remote")


def check_remote(config: Config) -> None:
    """Refuse addresses that cannot be used, and one that holds a run already which is not to be resumed.

    Raises:
        UserError: naming the key.
    """
    if "://" in config.resume:
        RemoteRun(config.resume, "resume")
    if config.run.remote is None:
        return
    remote = remote_of(config, config.run.name or "unnamed")
    try:
        if config.resume == "never" and config.run.name and any(remote.steps().values()):
            raise UserError(
                f"run.name: {remote.url} holds a run already; go on with it (resume=auto), choose another name or "
                "remove it"
            )
    except RemoteError as error:
        raise UserError(f"run.remote: {error}") from error


@dataclass(frozen=True)
class Uploaded:
    """A checkpoint that is whole in the store now."""

    step: int
    bytes: int
    seconds: float


class Mirror:
    """The thread, and what it knows of the store.

    Args:
        folder: the run's.
        remote: the folder in the store.
        settings: which checkpoints are kept.

    Attributes:
        held: the step that is being uploaded, which must not be removed from the disk.
        problem: why the last attempt has not brought everything there; "": it has.
        news: what was uploaded since somebody has asked, and what has failed, in words.
    """

    def __init__(self, folder: Path, remote: RemoteRun, settings: Checkpoint):
        self.folder, self.remote, self.settings = folder, remote, settings
        self.held: int | None = None
        self.problem = ""
        self.news: SimpleQueue[Uploaded | str] = SimpleQueue()
        self._token = secrets.token_hex(8)
        self._whole: dict[int, bytes] = {}  # steps that are whole there, with their manifests
        self._half: set[int] = set()
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of files as they were uploaded
        self._gone: set[str] = set()  # files that were set aside, and are not in their old place there
        self._asked = self._answered = 0
        self._changed = threading.Condition()

    def claim(self) -> None:
        """Say in the store that this job writes there, and look at what is there.

        Raises:
            UserError: another run is there.
            RemoteError: the store does not answer, or cannot be written.
        """
        for step, whole in self.remote.steps().items():
            if whole:
                self._whole[step] = self.remote.read(self._file(step, MANIFEST)) or b""
            else:
                self._half.add(step)
        if self._whole and self.remote.identity() != identity_in(self.folder):
            raise UserError(
                f"run.remote: {self.remote.url} holds another run ({self.remote.identity() or 'unknown'}); choose "
                "another run.name or another address"
            )
        words = {"token": self._token, "host": platform.node(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self.remote.write(HOLDER, (json.dumps(words, indent=1) + "\n").encode())
        self._send(self.folder / ENVIRONMENT, ENVIRONMENT)
        threading.Thread(target=self._serve, name="remote copy", daemon=True).start()

    def wake(self) -> None:
        """Have the thread look at what is on the disk."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether it has not done yet what it was asked for."""
        with self._changed:
            return self._answered < self._asked

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._answered < self._asked)
                asked = self._asked
            problem = ""
            try:
                self._bring_up_to_date()
            except RemoteError as error:
                problem = str(error)
            except Exception as error:  # whatever it is, training goes on
                problem = f"{type(error).__name__}: {error}"
            self.held = None
            if problem:
                self.news.put(problem)
            with self._changed:
                self.problem, self._answered = problem, asked

    def _bring_up_to_date(self) -> None:
        while (step := self._next()) is not None:
            began = time.perf_counter()
            self.held = step
            checkpoint = self.folder / CHECKPOINTS / files.name_of(step)
            try:
                size = self._upload(step, checkpoint)
            except (RemoteError, OSError):
                if checkpoint.is_dir():
                    raise
                continue  # it was removed from the disk just before it was held
            finally:
                self.held = None
            self._half.discard(step)
            self.news.put(Uploaded(step, size, time.perf_counter() - began))
        self._thin_out()
        self._upload_records()

    def _here(self) -> dict[int, bytes]:
        """The checkpoints on the disk, the newest first, with their manifests."""
        found = {}
        for step in files.steps(self.folder / CHECKPOINTS):
            manifest = self.folder / CHECKPOINTS / files.name_of(step) / MANIFEST
            with contextlib.suppress(OSError, ValueError):  # a damaged one takes the place of no whole one there
                text = manifest.read_bytes()
                files.parse_manifest(text)
                found[step] = text
        return found

    def _next(self) -> int | None:
        """The newest checkpoint on the disk that is not in the store."""
        return next((step for step, manifest in self._here().items() if self._whole.get(step) != manifest), None)

    @staticmethod
    def _file(step: int, name: str) -> str:
        return f"{CHECKPOINTS}/{files.name_of(step)}/{name}"

    def _upload(self, step: int, checkpoint: Path) -> int:
        """All files of a checkpoint, the manifest last; returns their bytes."""
        manifest = (checkpoint / MANIFEST).read_bytes()
        self._check_holder()
        if step in self._whole:  # of what the run has gone back from
            self.remote.set_aside(step)
            del self._whole[step]
        self._half.add(step)
        listed = files.parse_manifest(manifest)["files"]
        for file in listed:
            self.remote.put(checkpoint / file["name"], self._file(step, file["name"]))
        there = self.remote.sizes(f"{CHECKPOINTS}/{files.name_of(step)}")
        for file in listed:
            name = self._file(step, file["name"])
            if there.get(name) != file["size"]:
                raise RemoteError(f"{self.remote.url}/{name} has {there.get(name)} bytes instead of {file['size']:,}")
        self._check_holder()
        self.remote.write(self._file(step, MANIFEST), manifest)
        self._whole[step] = manifest
        self._point(max(self._whole.keys() & {step, *self._here()}))  # a newer one may be on the disk alone yet
        return sum(file["size"] for file in listed)

    def _point(self, step: int) -> None:
        self.remote.write(f"{CHECKPOINTS}/{LATEST}", f"{files.name_of(step)}\n".encode())

    def _check_holder(self) -> None:
        """Raise `RemoteError` where another job, perhaps of the same run on another machine, writes there now."""
        try:
            holder = json.loads(self.remote.read(HOLDER) or b"{}")
        except ValueError:
            holder = {}
        if not isinstance(holder, dict) or holder.get("token") != self._token:
            who = f"{holder.get('host')} since {holder.get('since')}" if isinstance(holder, dict) and holder else "?"
            raise RemoteError(f"{self.remote.url} was taken over by another job ({who}): nothing more is written there")

    def _thin_out(self) -> None:
        """Remove what the disk would not keep; nothing before the newest one on the disk is whole there."""
        newest = next(iter(self._here()), None)
        if newest is None or newest not in self._whole:
            return
        self._check_holder()
        best, settings = self.folder / CHECKPOINTS / BEST, self.settings
        kept = {f"{best.read_text().strip()}"} if best.is_file() else set()
        ours = sorted((step for step in self._whole if step <= newest), reverse=True)
        doomed, left = [], [step for step in self._whole if step > newest]  # left: what the run has gone back from
        for step in left:
            self.remote.set_aside(step)
            del self._whole[step]
        if left:
            self._point(newest)
        for step in ours[settings.keep :]:
            if files.name_of(step) not in kept and not (settings.keep_every and self._is_for_ever(step)):
                doomed.append(step)
        for step in (*doomed, *self._half):
            self.remote.remove_checkpoint(step)
            self._whole.pop(step, None)
            self._half.discard(step)
        if best.is_file():
            self._send(best, f"{CHECKPOINTS}/{BEST}")

    def _is_for_ever(self, step: int) -> bool:
        try:
            number = json.loads(self.remote.read(self._file(step, STATE)) or b"")["number"]
            return int(number) % int(self.settings.keep_every or 1) == 0
        except (ValueError, KeyError, TypeError):
            return True  # nothing is removed on a guess

    def _upload_records(self) -> None:
        """What else is in the run's folder, where it has changed, without weights.

        Results of an earlier end, which a run that trains on has set aside, leave their old place in the store too.
        """
        self._check_holder()
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if is_record(name) and path.is_file():
                self._send(path, name)
                _, mark, before = name.partition("/") if name.startswith(ASIDE) else ("", "", "")
                if mark and before not in self._gone and not (self.folder / before).exists():
                    self.remote.remove(before)
                    self._gone.add(before)
                    self._sent.pop(before, None)

    def _send(self, path: Path, name: str) -> None:
        status = os.stat(path)
        seen = (status.st_size, status.st_mtime_ns)
        if self._sent.get(name) != seen:
            self.remote.put(path, name)
            self._sent[name] = seen
            self._gone.discard(name)
