"""Where a run begins, decided by rank 0 and known to all; and the lock on its folder."""

import platform
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.fetch import source_of
from amclr_scale.checkpoint.lock import RunLock
from amclr_scale.checkpoint.marks import refuse_elsewhere
from amclr_scale.checkpoint.remote import RemoteError
from amclr_scale.checkpoint.resume import Found, find
from amclr_scale.config.schema import Config
from amclr_scale.data.tokenizers import Tokenizer
from amclr_scale.distributed.launcher import where
from amclr_scale.distributed.process_group import broadcast_object, gather_objects
from amclr_scale.errors import AgreedError, UserError
from amclr_scale.metrics.run_folder import name_run

RECORDS = "metrics.jsonl"
SHARE = "; put it on a file system that all nodes mount at the same place, or set run.shared=false"
_LOOK = 0.3  # seconds between two looks at whether rank 0 has fetched a checkpoint
T = TypeVar("T")


def agree_on_start(
    config: Config, folder: Path, fingerprint: str, tokenizer: Tokenizer, rank: int
) -> tuple[Found | None, Path, RunLock | None]:
    """The checkpoint to go on from, if any, the run folder, and the lock on it if it is there already.

    The folder is the checkpoint's own, unless run.name says another. All ranks call it together.

    Args:
        folder: of a run that begins.
        fingerprint: of the data.
        tokenizer: that captions go through.

    Raises:
        AgreedError: on every rank, what `find` raises on rank 0; or another run is in the folder, or another job; or
            some rank does not see the folder or the checkpoint.
    """
    search = _Search(config, folder, fingerprint, tokenizer) if rank == 0 else None
    while broadcast_object(search is not None and search.fetches()):  # so that no rank waits longer than it may
        time.sleep(_LOOK)
    found, folder, token, words, mark = broadcast_object(search.end() if search else None)
    if words:
        raise AgreedError(words)
    lock = search.lock if search else None
    if token:
        lock = _join(lock, folder, rank, token, config.run.shared)
    if found and config.run.shared:
        _check_seen(found, mark)
    return found, folder, lock


def goes_on(config: Config) -> bool:
    """Whether there is a checkpoint that the run would go on from. Nothing is locked, fetched or agreed upon.

    Raises:
        UserError: what is there cannot be used.
    """
    newest = cache(files.newest_valid)
    try:
        return source_of(config, name_run(config, None), newest) is not None or find(config, newest) is not None
    except RemoteError as error:
        raise UserError(f"resume: {error}") from error


class _Search:
    """Rank 0's part: looks for the checkpoint, and for what stands against going on from it."""

    def __init__(self, config: Config, folder: Path, fingerprint: str, tokenizer: Tokenizer):
        self.config, self.folder, self.fingerprint, self.tokenizer = config, folder, fingerprint, tokenizer
        self.found: Found | None = None
        self.lock: RunLock | None = None
        self.words = ""
        self._fetching: Beside[Found] | None = None
        self._carefully(self._begin)

    def _carefully(self, step: Callable[[], None]) -> None:
        try:
            step()
        except UserError as error:
            self.words = str(error)
        except RemoteError as error:
            self.words = f"resume: {error}; check the address, the permissions and the network"

    def _begin(self) -> None:
        config = self.config
        if config.run.name and self.folder.exists():
            self.lock = RunLock.take(self.folder)  # first, so that nobody changes what is found
        newest = cache(files.newest_valid)  # it reads every byte: once is enough
        source = source_of(config, self.folder, newest)
        if source is not None:
            source.look()  # a mistake is told before there is a folder
            self.folder = source.folder
            self.lock = self.lock or RunLock.take(self.folder)
            self._fetching = Beside(source.bring)
            return
        if config.resume == "auto":
            refuse_elsewhere(self.folder)
        self.found = found = find(config, newest)
        if found and not config.run.name:
            self.folder = found.run
            self.lock = RunLock.take(self.folder)
            if files.steps(found.checkpoint.parent)[0] != files.step_of(found.checkpoint):
                self.found = find(config)  # another job was in it and has just ended

    def fetches(self) -> bool:
        """Whether a checkpoint is still on its way from a store."""
        return self._fetching is not None and self._fetching.runs()

    def end(self) -> tuple[Found | None, Path, str, str, str]:
        """The checkpoint, the run's folder, the lock's token, what stands against going on, and the checkpoint's mark.

        Where something does, nothing is locked.
        """
        if not self.words:
            self._carefully(self._check)
        if self.words and self.lock:
            self.lock.release()
        mark = files.mark(self.found.checkpoint) if self.found else ""
        return self.found, self.folder, self.lock.token if self.lock else "", self.words, mark

    def _check(self) -> None:
        if self._fetching:
            self.found = self._fetching.result()
        found, config = self.found, self.config
        if found:
            found.check(config, data=self.fingerprint, tokenizer=self.tokenizer.fingerprint())
            if self.folder.resolve() != found.run.resolve() and (self.folder / RECORDS).exists():
                raise UserError(
                    f"run.name: {self.folder} holds another run than the one that resume={config.resume} names"
                )


class Beside(Generic[T]):
    """Something that takes its time, in a thread: ranks wait for it by asking one another, no longer than they may."""

    def __init__(self, work: Callable[[], T]):
        self._found: T | None = None
        self.error: Exception | None = None

        def run() -> None:
            try:
                self._found = work()
            except Exception as error:
                self.error = error

        self._thread = threading.Thread(target=run, name="fetching", daemon=True)
        self._thread.start()

    def runs(self, seconds: float = 0.0) -> bool:
        """Whether it is not done yet, after so many seconds at most."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def result(self) -> T | None:
        """What it gave; raises what it raised."""
        if self.error:
            raise self.error
        return self._found


def lock_new(folder: Path, rank: int, shared: bool = True) -> RunLock:
    """Make and lock the folder of a run that was not there when the start was agreed on. All ranks call it together.

    So a mistake that is found while the model is built leaves no folder behind.

    Args:
        shared: whether all ranks have to see it (run.shared).

    Raises:
        AgreedError: on every rank, another job has made it meanwhile, or some rank does not see it.
    """
    lock: RunLock | None = None
    words = ""
    if rank == 0:
        try:
            lock = RunLock.take(folder)
            if (folder / RECORDS).exists():
                lock.release()
                words = f"run.name: another job has made {folder} meanwhile; go on with it, or choose another name"
        except UserError as error:
            words = str(error)
    words, token = broadcast_object((words, lock.token if lock else ""))
    if words:
        raise AgreedError(words)
    return _join(lock, folder, rank, token, shared)


def _join(lock: RunLock | None, folder: Path, rank: int, token: str, shared: bool) -> RunLock:
    """Every rank's lock, once all see the folder that rank 0 has locked. All ranks call it together.

    Raises:
        AgreedError: some do not.
    """
    words = ""
    try:
        lock = lock or RunLock.join(folder, rank, token, shared)
    except UserError as error:
        words = str(error)
    try:
        together(words, "run.folder: expected a folder that all ranks see and can write", SHARE)
    except AgreedError:
        if lock:
            lock.release()
        raise
    assert lock
    return lock


def _check_seen(found: Found, mark: str) -> None:
    """Raise `AgreedError` on all ranks if some do not see the checkpoint that rank 0 has found."""
    words = "" if files.mark(found.checkpoint) == mark else f"{found.checkpoint.absolute()} is not there, or another"
    together(words, "resume: expected all ranks to see the checkpoint that rank 0 has found", SHARE)


def together(words: str, expected: str, fix: str = "", error: type[Exception] = AgreedError) -> None:
    """Raise `AgreedError`, or another one, on all ranks if some have words of a problem. All ranks call it together."""
    everyone = gather_objects((platform.node(), words))
    hosts = [host for host, _ in everyone]
    told: dict[str, list[int]] = {}
    for rank, (_, problem) in enumerate(everyone):
        if problem:
            told.setdefault(problem, []).append(rank)
    if told:
        got = "; ".join(f"{problem} on {where(ranks, hosts)}" for problem, ranks in told.items())
        raise error(f"{expected}, got: {got}{fix}")
