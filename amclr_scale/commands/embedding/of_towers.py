"""Features of a recipe's frozen towers, before their heads: what `data.features` names (`embed --config RECIPE`).

Each sample's picture and caption goes once through the tower that training would run, in the same precision. A sample
that cannot be read has no row of its own: training then replaces it as it would have without features.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from amclr_scale.commands.embed import header, unfinished
from amclr_scale.commands.train import started
from amclr_scale.config import schema
from amclr_scale.config.load import load
from amclr_scale.config.recipe import Features
from amclr_scale.data.beside.features import STORED, about_of, reading, sides_of
from amclr_scale.data.beside.references import FINGERPRINT
from amclr_scale.data.decoding import BadSampleError
from amclr_scale.data.indexing import open_index
from amclr_scale.data.pipeline import Pipeline
from amclr_scale.data.tokenizers import Tokenizer, load_tokenizer
from amclr_scale.distributed.process_group import named_device, seed_everything
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.resting import digest, in_precision
from amclr_scale.engine.build import model_of
from amclr_scale.engine.deepspeed_setup import check_tf32
from amclr_scale.errors import UserError
from amclr_scale.precision import DTYPES


class _Samples(Dataset[tuple[Tensor, list[int]] | str]):
    """Batch k of the samples in the order of ids: what the tower is given, and which of them cannot be read."""

    def __init__(self, pipeline: Pipeline, side: str, batch_size: int):
        self.pipeline, self.side, self.size = pipeline, side, batch_size

    def __len__(self) -> int:
        return (self.pipeline.index.num_samples + self.size - 1) // self.size

    def __getitem__(self, number: int) -> tuple[Tensor, list[int]] | str:
        first, data = number * self.size, self.pipeline.data
        ids = range(first, min(first + self.size, self.pipeline.index.num_samples))
        bad = list[int]()
        pictures = torch.zeros(len(ids), 3, data.image_size, data.image_size, dtype=torch.uint8)
        captions = [""] * len(ids)
        try:
            for row, sample in enumerate(ids):
                try:
                    if self.side == "image":
                        pictures[row] = self.pipeline.picture(sample)
                    else:
                        captions[row] = self.pipeline.caption(sample)
                except BadSampleError:
                    bad.append(sample)
        except UserError as error:  # whole, not as a worker's traceback
            return str(error)
        return (pictures if self.side == "image" else self.pipeline.tokenizer(captions)), bad


def write_features(config: schema.Config, *, device: str, batch_size: int) -> Iterator[str]:
    """Write the files that `data.features` names, and say so; those that are there already and fit stay.

    Raises:
        UserError: none is named, or the samples, the model or the place to write to are not usable.
    """
    sides = sides_of(config.data)
    if not sides:
        raise UserError(
            "data.features: expected the files to write, such as data.features.image=cc3m_image.npy, got none"
        )
    for side in sides:
        file = Path(getattr(config.data.features, side)).expanduser()
        if file.suffix != ".npy" or not file.absolute().parent.is_dir():
            raise UserError(f"data.features.{side}: expected NAME.npy in a folder that is there, got {file}")
    data = config.data.model_copy(update={"features": Features()})
    tokenizer = load_tokenizer(data.tokenizer, data.context_length)
    pipeline = Pipeline(open_index(data), data, config.seed, tokenizer)
    seed_everything(config.seed)
    model = model_of(config, tokenizer).eval()
    about = {side: _about(side, config, model, pipeline, tokenizer) for side in sides}
    there = named_device(device)
    check_tf32(config.execution, there)
    in_precision(model, there, DTYPES[config.execution.precision])
    model.computes_in = config.execution.precision
    for side in sides:
        file = Path(getattr(config.data.features, side)).expanduser()
        yield f"{_write(file, side, about[side], model, pipeline, config, batch_size)} -> {file}"
    pipeline.index.close()


def _about(
    side: str, config: schema.Config, model: DualEncoder, pipeline: Pipeline, tokenizer: Tokenizer
) -> dict[str, Any]:
    """All that has to be the same in a run that reads them."""
    return {
        FINGERPRINT: pipeline.index.fingerprint,
        "tower": digest(getattr(model, f"{side}_tower")),
        "name": getattr(config.model, side).name,
        "precision": config.execution.precision,
        "reads": reading(side, config.data, tokenizer),
        "width": model.widths[side],
    }


def _write(
    file: Path, side: str, about: dict[str, Any], model: DualEncoder, pipeline: Pipeline, config: schema.Config,
    batch_size: int,
) -> str:  # fmt: skip
    total, beside = pipeline.index.num_samples, file.with_name(f"{file.name}.json")
    if file.is_file() and beside.is_file() and about.items() <= about_of(f"data.features.{side}", file).items():
        return f"{total:,} rows of the {side} tower are there already"
    beside.unlink(missing_ok=True)
    bad, dtype = list[int](), ""
    loader = DataLoader(
        _Samples(pipeline, side, batch_size), batch_size=None, num_workers=config.execution.workers,
        generator=torch.Generator(),
    )  # fmt: skip
    with unfinished(file) as new, new.open("wb") as out, torch.no_grad():
        for found in loader:
            if isinstance(found, str):
                raise UserError(found)
            inputs, failed = found
            rows = model(**{f"{side}s": (inputs,)}, features=True, tokens=False)[f"{side}_features"].cpu()
            if not dtype:
                dtype = str(rows.dtype).removeprefix("torch.")
                if dtype not in STORED:
                    raise UserError(
                        f"execution.precision: features of {dtype} are not kept; expected fp32, bf16 or fp16"
                    )
                header(out, total, rows.shape[1], STORED[dtype])
            stored = rows.contiguous().view(torch.int16) if dtype == "bfloat16" else rows
            out.write(np.ascontiguousarray(stored.numpy()).tobytes())
            bad += failed
    with unfinished(beside) as new:
        new.write_text(json.dumps({**about, "dtype": dtype, "bad": bad}) + "\n", "utf-8")
    unread = f", {len(bad):,} of which cannot be read" if bad else ""
    return f"{total:,} samples{unread}: features of {dtype}, {model.widths[side]} wide"


def run(config: str, words: list[str], *, device: str, batch_size: int) -> None:
    """`embed --config`.

    Raises:
        UserError: the recipe or what it names is not usable.
    """
    recipe = started(load(config, words), 1)
    for said in write_features(recipe, device=device, batch_size=batch_size):
        print(said, flush=True)
