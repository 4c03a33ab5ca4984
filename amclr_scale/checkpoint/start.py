"""Where a run begins, decided by rank 0 and known to all."""

from pathlib import Path

import torch.distributed as dist

from amclr_scale.checkpoint.resume import Found, find
from amclr_scale.config.schema import Config
from amclr_scale.errors import UserError


def agree_on_start(config: Config, folder: Path, fingerprint: str, rank: int) -> tuple[Found | None, Path]:
    """The checkpoint to go on from, if any, and the run folder: the checkpoint's own, unless run.name says another.

    Args:
        folder: of a run that begins.
        fingerprint: of the data.

    Raises:
        UserError: on every rank, what `find` raises on rank 0; or another run is in the folder.
    """
    found: Found | None = None
    words = ""
    if rank == 0:
        try:
            found = find(config)
            if found:
                found.step(config)
                found.check_data(config, fingerprint)
                if not config.run.name:
                    folder = found.run
                elif folder.resolve() != found.run.resolve() and (folder / "metrics.jsonl").exists():
                    words = f"run.name: {folder} holds another run than the one that resume={config.resume} names"
        except UserError as error:
            words = str(error)
    box: list[tuple[Found | None, Path, str]] = [(found, folder, words)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    found, folder, words = box[0]
    if words:
        raise UserError(words)
    return found, folder
