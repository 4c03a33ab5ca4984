"""Where a run begins, decided by rank 0 and known to all; and the lock on its folder."""

import platform
from pathlib import Path
from typing import TypeVar

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.lock import RunLock
from amclr_scale.checkpoint.resume import Found, find
from amclr_scale.config.schema import Config
from amclr_scale.data.tokenizers import Tokenizer
from amclr_scale.distributed.launcher import where
from amclr_scale.distributed.process_group import broadcast_object, gather_objects
from amclr_scale.errors import AgreedError, UserError

RECORDS = "metrics.jsonl"
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
    found: Found | None = None
    lock: RunLock | None = None
    words = ""
    if rank == 0:
        try:
            if config.run.name and folder.exists():
                lock = RunLock.take(folder)  # first, so that nobody changes what is found
            found = find(config)
            if found and not config.run.name:
                folder = found.run
                lock = RunLock.take(folder)
                if files.steps(found.checkpoint.parent)[0] != files.step_of(found.checkpoint):
                    found = find(config)  # another job was in it and has just ended
            if found:
                found.check(config, data=fingerprint, tokenizer=tokenizer.fingerprint())
                if folder.resolve() != found.run.resolve() and (folder / RECORDS).exists():
                    words = f"run.name: {folder} holds another run than the one that resume={config.resume} names"
        except UserError as error:
            words = str(error)
        if words and lock:
            lock.release()
    mark = files.mark(found.checkpoint) if found else ""
    found, folder, token, words, mark = broadcast_object((found, folder, lock.token if lock else "", words, mark))
    if words:
        raise AgreedError(words)
    if token:
        lock = _join(lock, folder, rank, token)
    if found:
        _check_seen(found, mark)
    return found, folder, lock


def lock_new(folder: Path, rank: int) -> RunLock:
    """Make and lock the folder of a run that was not there when the start was agreed on. All ranks call it together.

    So a mistake that is found while the model is built leaves no folder behind.

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
    return _join(lock, folder, rank, token)


def _join(lock: RunLock | None, folder: Path, rank: int, token: str) -> RunLock:
    """Every rank's lock, once all see the folder that rank 0 has locked. All ranks call it together.

    Raises:
        AgreedError: some do not.
    """
    words = ""
    try:
        lock = lock or RunLock.join(folder, rank, token)
    except UserError as error:
        words = str(error)
    try:
        _together(words, "run.folder: expected a folder that all ranks see and can write")
    except AgreedError:
        if lock:
            lock.release()
        raise
    assert lock
    return lock


def _check_seen(found: Found, mark: str) -> None:
    """Raise `AgreedError` on all ranks if some do not see the checkpoint that rank 0 has found."""
    words = "" if files.mark(found.checkpoint) == mark else f"{found.checkpoint.absolute()} is not there, or another"
    _together(words, "resume: expected all ranks to see the checkpoint that rank 0 has found")


def _together(words: str, expected: str) -> None:
    """Raise `AgreedError` on all ranks if some have words of a problem."""
    everyone = gather_objects((platform.node(), words))
    hosts = [host for host, _ in everyone]
    told: dict[str, list[int]] = {}
    for rank, (_, problem) in enumerate(everyone):
        if problem:
            told.setdefault(problem, []).append(rank)
    if told:
        got = "; ".join(f"{problem} on {where(ranks, hosts)}" for problem, ranks in told.items())
        raise AgreedError(f"{expected}, got: {got}; put it on a file system that all nodes mount at the same place")
