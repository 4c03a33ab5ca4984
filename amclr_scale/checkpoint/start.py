"""Where a run begins, decided by rank 0 and known to all."""

from pathlib import Path

import torch.distributed as dist

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.lock import RunLock
from amclr_scale.checkpoint.resume import Found, find
from amclr_scale.config.schema import Config
from amclr_scale.data.tokenizers import Tokenizer
from amclr_scale.errors import UserError


def agree_on_start(
    config: Config, folder: Path, fingerprint: str, tokenizer: Tokenizer, rank: int
) -> tuple[Found | None, Path, RunLock]:
    """The checkpoint to go on from, if any, the run folder, and the lock on it, which this process now holds.

    The folder is the checkpoint's own, unless run.name says another.

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
                if folder.resolve() != found.run.resolve() and (folder / "metrics.jsonl").exists():
                    words = f"run.name: {folder} holds another run than the one that resume={config.resume} names"
            if not words:
                lock = lock or RunLock.take(folder)
        except UserError as error:
            words = str(error)
    box: list[tuple[Found | None, Path, str]] = [(found, folder, words)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    found, folder, words = box[0]
    if words:
        if lock:
            lock.release()
        raise UserError(words)
    return found, folder, lock or RunLock.join(folder, rank)
