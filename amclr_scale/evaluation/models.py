"""Models to evaluate: our runs, open_clip's architectures, folders of transformers.

    FOLDER or FOLDER/weights.safetensors      a run of ours, with its config.yaml beside the weights
    open_clip/ARCHITECTURE:FILE               a checkpoint for one of open_clip's architectures
    open_clip/FOLDER                          a model as open_clip publishes it, with open_clip_config.json
    transformers/FOLDER                       a dual encoder saved by transformers, with its tokenizer and processor
    OWNER/NAME[@REVISION], ARCHITECTURE/TAG   one of these on the Hugging Face hub (encoders/start/hub_names.py)

All are called alike: `model(images=(uint8,), texts=(ids,)) -> {"image": (b, D), "text": (b, D)}`, unit length, and
normalise pixels themselves. Only what is named on the hub is downloaded.
"""

import itertools
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amclr_scale.config.load import load
from amclr_scale.config.schema import Config, Data
from amclr_scale.data.reading import Reading
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder, Normalise
from amclr_scale.encoders.libraries.open_clip_towers import kept_name
from amclr_scale.encoders.libraries.transformers_parts import TOWERS
from amclr_scale.encoders.start.hub import fetch
from amclr_scale.encoders.start.hub_names import hint, parse
from amclr_scale.encoders.weights import OF_OBJECTIVES, load_weights
from amclr_scale.errors import UserError
from amclr_scale.precision import DTYPES, has_tf32

SHOWN = 5  # runs of a folder, told by name


@dataclass(frozen=True)
class Loaded:
    """A model, and how it wants its images and captions."""

    name: str
    model: nn.Module
    config: Config  # of a run of ours all of it; of others the section `data` only says something
    folder: Path | None  # the run's
    step: str = ""  # the checkpoint's name, of a model that is one
    state: Path | None = None  # the file of the objective's per-sample state, where there is one
    reading: Reading | None = None  # a foreign model's own way with pictures and captions; None: the configuration's
    held: object = None  # while it lives, what the model was read from stays where it is


def load_model(name: str) -> Loaded:
    """A model by one of the names above, in evaluation mode, on the CPU.

    Raises:
        UserError: there is no such thing here, or its parts do not fit together.
    """
    if (named := parse(name)) is not None:
        there = fetch(named, "checkpoint")
        place = str(there.place) if there.library == "ours" else f"{there.library}/{there.place}"
        return replace(load_model(place), name=str(there.name), folder=None)
    library, _, rest = name.partition("/")
    if library == "open_clip" and rest and not Path(name).exists():
        from amclr_scale.evaluation.foreign.of_open_clip import open_open_clip

        model, config, reading = open_open_clip(name, rest)
        found = Loaded(name, model, config, None, reading=reading)
    elif library == "transformers" and rest and not Path(name).exists():
        from amclr_scale.evaluation.foreign.of_transformers import open_transformers

        model, config, reading = open_transformers(name, Path(rest).expanduser())
        found = Loaded(name, model, config, None, reading=reading)
    else:
        found = _ours(name)
    found.model.eval()
    return found


def _ours(name: str) -> Loaded:
    path = Path(name).expanduser()
    folder, weights = (path, path / "weights.safetensors") if path.is_dir() else (path.parent, path)
    missing = [file for file in (weights, folder / "config.yaml") if not file.is_file()]
    if missing:
        raise UserError(
            f"checkpoint: expected a run folder with config.yaml and weights.safetensors, open_clip/ARCHITECTURE:FILE, "
            f"transformers/FOLDER, or OWNER/NAME of the Hugging Face hub, got {name}: {missing[0]} does not exist"
            f"{hint(name)}{_runs_in(path)}"
        )
    config = with_own_files(load(folder / "config.yaml", trusted=False), folder)
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer, data.context_length)
    tokenizer.check_saved(Path(data.tokenizer))
    model = build_model(
        config.model.model_copy(update={"init": str(weights)}),  # so stored statistics are those of trained weights
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        end_id=tokenizer.end_id,
        context_length=data.context_length,
        image_size=data.image_size,
        image_mean=data.image_mean,
        image_std=data.image_std,
        weights=False,  # the run's file has them all, whatever it began from
    )
    load_weights(model, str(weights), key="checkpoint", prefix="", extra=OF_OBJECTIVES)
    name = folder.name if weights.stem == "weights" else f"{folder.name}/{weights.stem}"
    return Loaded(name, model, config, folder, state=folder / "objective.safetensors")


def _runs_in(folder: Path) -> str:
    """That a folder is one of runs, in words; "": it is not."""
    runs = sorted(file.parent.name for file in folder.glob("*/config.yaml"))
    if not runs:
        return ""
    further = f", ... ({len(runs):,} of them)" if len(runs) > SHOWN else ""
    return f"; name the runs in it: {', '.join(str(folder / run) for run in runs[:SHOWN])}{further}"


def with_own_files(config: Config, folder: Path) -> Config:
    """Runs and exported folders have their tokenizer in them, and what describes towers of libraries."""
    changes: dict[str, Any] = {}
    if (folder / "tokenizer").is_dir():
        changes["data"] = config.data.model_copy(update={"tokenizer": str(folder / "tokenizer")})
    towers = {side: getattr(config.model, side) for side, place in TOWERS.items() if (folder / place).is_dir()}
    named: dict[str, Any] = {
        side: tower.model_copy(update={"name": kept_name(tower.name, folder / TOWERS[side])})
        for side, tower in towers.items()
    }
    changes["model"] = config.model.model_copy(update=named)
    return config.model_copy(update=changes)


def compute_in(loaded: Loaded, precision: str, device: torch.device) -> str:
    """Have a model compute as it was trained ("run"), or in fp32, bf16 or fp16; returns what it computes in.

    As under DeepSpeed, parameters change and buffers do not. Models of others were trained nobody knows how: fp32.
    A run in tf32 is fp32 on a device that has no such products.
    """
    chosen: str = loaded.config.execution.precision if precision == "run" else precision
    if chosen == "tf32" and not has_tf32(device):
        chosen = "fp32"
    if isinstance(loaded.model, DualEncoder):
        loaded.model.computes_in = chosen
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.to(DTYPES[chosen])
    return chosen


def check_reading(loaded: Loaded, data: Data) -> None:
    """A model of others reads by its own processor and tokenizer, whatever a configuration says.

    Raises:
        UserError: `data` says otherwise.
    """
    for key in ("tokenizer", "context_length", "image_size") if loaded.reading else ():
        here, own = getattr(data, key), getattr(loaded.config.data, key)
        if here != own:
            raise UserError(
                f"data.{key}: expected {own!r}, as {loaded.name} was saved, got {here!r}; leave it away: models of "
                "other libraries read by their own processor and tokenizer"
            )


def name_beside(loaded: Loaded, given: str, others: Container[str]) -> str:
    """What a model is called beside others: its own name, else as it was given, else that with a number.

    Args:
        given: the words that it was opened by.
        others: names that are taken.
    """
    numbered = (f"{given} ({number})" for number in itertools.count(2))
    return next(name for name in itertools.chain((loaded.name, given), numbered) if name not in others)


def use_statistics(loaded: Loaded, data: Data) -> None:
    """Have the model normalise images by another mean and standard deviation than it was trained with."""
    if (data.image_mean, data.image_std) != (loaded.config.data.image_mean, loaded.config.data.image_std):
        loaded.model.normalise = Normalise(data.image_mean, data.image_std)
