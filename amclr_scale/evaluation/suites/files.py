"""Where a data set lies, and what it and a model are recognised by: so that a finished data set is measured once.

A data set's digest is of its files' names and contents, the same wherever it lies. While names, sizes and times of
change stay, the files are not read again. A model's digest is of its weights as it computes with them, and of what it
makes of one picture and a few captions, so that another tokenizer, image size or way of cropping is another model.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from amclr_scale.data.reading import Reading
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.distributed.process_group import broadcast_object, gather_objects
from amclr_scale.errors import UserError
from amclr_scale.evaluation.suites.catalogue import Suite

Files = Mapping[str, Path]  # every file that counts, by a name that does not say where the data set lies

_PROBES = ["", "a photo of a cat.", "Two dogs, and 3 (three) birds!", "word " * 100]


def locate(suite: Suite, folder: Path) -> dict[str, str]:
    """Data set -> the first of its places that is there below a folder; those that have none are left out.

    Raises:
        UserError: there is no such folder, or none of the suite's data sets in it.
    """
    if not folder.is_dir():
        raise UserError(f"--data: expected the folder that holds the data sets of {suite.name}, got {folder}")
    found = {}
    for one in suite.sets:
        place = next((place for place in one.places if _fits(folder / place)), None)
        if place is not None:
            found[one.name] = place
    if not found:
        raise UserError(
            f"--data: {folder}: expected at least one data set of {suite.name}, found none; looked for "
            + ", ".join(one.places[0] for one in suite.sets)
        )
    return found


def _fits(path: Path) -> bool:
    """Whether something lies there. Folders named wds_... are meant; others may hold the data set in another layout."""
    return path.exists() and (not path.is_dir() or path.name.startswith("wds_") or (path / "test").is_dir())


def stamp(files: Files) -> str:
    """A digest of names, sizes and times of change: whoever has not touched the files gets the same."""
    known = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in sorted(files.items())]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def content(files: Files) -> str:
    """A digest of names and contents. All ranks call it together, and each reads a share of the files."""
    mine = sorted(files.items())[rank() :: world_size()]
    found = [(name, _digest(path)) for name, path in mine]
    everything = sorted(one for part in gather_objects(found) for one in part)
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_model(model: nn.Module, reading: Reading, also: Sequence[Any] = ()) -> str:
    """A digest of weights and of how pictures and captions are read, the same on every rank.

    Args:
        also: whatever else changes numbers, as JSON.
    """
    if rank():
        return broadcast_object(None) or ""
    found = hashlib.sha256(json.dumps(list(also)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(_raw(tensor))
    found.update(_raw(reading.tokenizer(_PROBES)))
    red = Image.linear_gradient("L").resize((97, 61))
    picture = Image.merge("RGB", (red, red.rotate(180), red.transpose(Image.Transpose.ROTATE_90).resize(red.size)))
    found.update(_raw(reading.view(picture)))
    return broadcast_object(found.hexdigest())


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
