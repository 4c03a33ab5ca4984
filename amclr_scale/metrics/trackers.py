"""Where a run's numbers and pictures go beside its folder: Weights & Biases, TensorBoard, trackio.

Another one is a class like these and a line in `open_trackers`.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from amclr_scale.config.schema import Config
from amclr_scale.errors import UserError

EVENTS = "tensorboard"  # folder of the run's
_LONGEST = 1 << 20  # bytes of a record


class Tracker(Protocol):
    """What is told to one of them, by rank 0."""

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """What was measured at a step; steps do not fall."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """A PNG of the run folder."""

    def close(self, *, failed: bool) -> None:
        """Nothing comes any more; all is sent, or on the disk."""


def open_trackers(folder: Path, config: Config) -> list[Tracker]:
    """Those that the configuration asks for.

    Raises:
        UserError: a package is missing.
    """
    run, found = config.run, list[Tracker]()
    if run.wandb != "off":
        found.append(_Wandb(folder, config))
    if run.tensorboard:
        found.append(_TensorBoard(folder))
    if run.trackio:
        found.append(_Trackio(folder, config))
    return found


def check_trackers(config: Config) -> None:
    """Refuse those whose package is not installed, before anything is loaded.

    Raises:
        UserError: naming the key.
    """
    wanted = {"wandb": config.run.wandb != "off", "tensorboard": config.run.tensorboard, "trackio": config.run.trackio}
    for package, asked in wanted.items():
        found = importlib.util.find_spec(package) if asked else None
        if asked and (
            found is None or found.origin is None
        ):  # a folder of that name, as wandb leaves in the place of a run
            raise UserError(
                f"run.{package}: the package {package} is not installed: pip install {package}, or leave run.{package} "
                "as it is by default"
            )


class _Wandb:
    def __init__(self, folder: Path, config: Config):
        self._package: Any = importlib.import_module("wandb")
        self._run = self._package.init(
            project=config.run.wandb_project, group=config.run.wandb_group, name=folder.name, dir=str(folder),
            mode=config.run.wandb, config=config.model_dump(mode="json"),
        )  # fmt: skip

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._package.Image(str(path))}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class _TensorBoard:
    """Event files in the run folder; a resumed run hides those steps of theirs that it makes again."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / EVENTS), purge_step=_next_step(folder / "metrics.jsonl"))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        self._writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Trackio:
    """Numbers on this machine, for `trackio show`; elsewhere as trackio's own variables say."""

    def __init__(self, folder: Path, config: Config):
        self._package: Any = importlib.import_module("trackio")
        self._package.init(
            project=config.run.wandb_project, group=config.run.wandb_group, name=folder.name, resume="allow",
            config=config.model_dump(mode="json"), embed=False,
        )  # fmt: skip

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._package.log(dict(values), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._package.log({name: self._package.Image(str(path))}, step=step)

    def close(self, *, failed: bool) -> None:
        self._package.finish()


def _next_step(records: Path) -> int:
    """After the last record of a run that is resumed, from which later ones have been taken away; 0 in a new one."""
    with records.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST))
        lines = file.read().splitlines()
    return int(json.loads(lines[-1])["step"]) + 1 if lines else 0
