"""Where a run begins, decided by rank 0 and known to all; and the lock on its folder."""

from pathlib import Path
from typing import TypeVar

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.lock import RunLock
from amclr_scale.checkpoint.resume import Found, find
from amclr_scale.config.schema import Config
from amclr_scale.data.tokenizers import Tokenizer
from amclr_scale.distributed.process_group import broadcast_object
from amclr_scale.errors import UserError

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
        UserError: on every rank, what `find` raises on rank 0; or another run is in the folder, or another job.
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
                found.step(config)
                found.check_data(config, fingerprint)
                found.check_tokenizer(config, tokenizer.fingerprint())
                if folder.resolve() != found.run.resolve() and (folder / RECORDS).exists():
                    words = f"run.name: {folder} holds another run than the one that resume={config.resume} names"
        except UserError as error:
            words = str(error)
        if words and lock:
            lock.release()
    found, folder, held, words = broadcast_object((found, folder, lock is not None, words))
    if words:
        raise UserError(words)
    return found, folder, lock or (RunLock.join(folder, rank) if held else None)


def lock_new(folder: Path, rank: int) -> RunLock:
    """Make and lock the folder of a run that was not there when the start was agreed on. All ranks call it together.

    So a mistake that is found while the model is built leaves no folder behind.

    Raises:
        UserError: on every rank, another job has made it meanwhile.
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
    (words,) = broadcast_object((words,))
    if words:
        raise UserError(words)
    return lock or RunLock.join(folder, rank)
