"""Features of frozen towers, made beforehand: what the tower gives for every sample, before its head.

    amclr-scale embed --config RECIPE

writes the files that `data.features` names, and beside each a NAME.npy.json that says of which samples, by which tower,
from pictures or captions read how. Training then reads rows by sample id, from a mapped file: it opens no picture and
runs no such tower. Zhai et al., "LiT", CVPR 2022, arXiv:2111.07991 (appendix C) do the same.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amclr_scale.config import schema
from amclr_scale.data.beside.references import FINGERPRINT, SIDES, References
from amclr_scale.data.decoding import BadSampleError
from amclr_scale.data.index import Index
from amclr_scale.data.tokenizers import Tokenizer
from amclr_scale.errors import UserError

# By the name of torch's type: how numpy stores it. It has no bfloat16, of which the bits are kept.
STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
_READ = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_AGAIN = "amclr-scale embed --config RECIPE writes them"


class Features(References):
    """`features(samples)` -> (n, width), their rows, in the type that the tower gave them.

    Args:
        side: image or text.
        data: the recipe's section, which names the file.
        tokenizer: how captions are read, where they are.

    Attributes:
        width: of the tower's features.
        bad: (N,) bool, samples that could not be read when they were made.

    Raises:
        UserError: the file cannot be read, is of other samples, or of samples that were read otherwise.
    """

    writes = _AGAIN
    kinds = "fu"

    def __init__(self, side: str, data: schema.Data, index: Index, tokenizer: Tokenizer):
        file = getattr(data.features, side)
        super().__init__(f"data.features.{side}", file, index)
        self.side, self.file, self.width = side, self.files[0], int(self.tables[0].shape[1])
        self.about = about_of(self.key, self.file)
        self.dtype = _READ[self.about["dtype"]]
        self.bad = np.zeros(index.num_samples, np.bool_)
        self.bad[self.about["bad"]] = True
        if self.tables[0].dtype.str != STORED[self.about["dtype"]]:
            raise UserError(f"{self.key}: {self.file}: expected rows of {self.about['dtype']}; {self.writes}")
        self._expect("reads", reading(side, data, tokenizer))

    def check_tower(self, tower: str, precision: str, width: int) -> None:
        """Raise `UserError` unless this tower has given them.

        Args:
            tower: digest of its weights.
            precision: of the run.
            width: of its features.
        """
        self._expect("width", width)
        self._expect("precision", precision)
        self._expect("tower", tower)

    def _expect(self, name: str, here: Any) -> None:
        there = self.about.get(name)
        if there == here:
            return
        what = {"tower": "the weights of the tower", "precision": "execution.precision"}.get(name, name)
        if isinstance(here, dict) and isinstance(there, dict):
            name = next(key for key in here | there if here.get(key) != there.get(key))
            what, here, there = f"data.{name}", here.get(name), there.get(name)
        raise UserError(
            f"{self.key}: {self.file}: expected features made with what this run has as {what}, {here}, got those made "
            f"with {there}; {self.writes} anew"
        )

    def check(self, sample: int) -> None:
        """Raise `BadSampleError` for a sample that could not be read when the features were made."""
        if self.bad[sample]:
            raise BadSampleError("no features", f"the {self.side} could not be read when {self.file.name} was made")

    def __call__(self, samples: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Rows of some samples.

        Raises:
            UserError: one of them holds no numbers.
        """
        found = self.tables[0][np.asarray(samples, np.int64)]
        rows = (
            torch.from_numpy(found.view(np.int16)).view(self.dtype) if found.dtype == "<u2" else torch.from_numpy(found)
        )
        bad = ~rows.isfinite().all(1)
        if bad.any():
            sample = int(samples[int(bad.int().argmax())])
            raise UserError(
                f"{self.key}: {self.file}: expected finite numbers for sample {self._named(sample)}, got others; "
                f"{self.writes} anew"
            )
        return rows

    def digest(self) -> str:
        """8 hex digits of the content, and of what it says of itself."""
        said = json.dumps(self.about, sort_keys=True).encode()
        return hashlib.sha256(super().digest().encode() + said).hexdigest()[:8]


def open_features(data: schema.Data, index: Index, tokenizer: Tokenizer) -> dict[str, Features]:
    """Those that a recipe names, by side."""
    return {side: Features(side, data, index, tokenizer) for side in sides_of(data)}


def sides_of(data: schema.Data) -> tuple[str, ...]:
    """The sides of which a recipe has features."""
    return tuple(side for side in SIDES if getattr(data.features, side) is not None)


def reading(side: str, data: schema.Data, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides about the tensors that a tower is given for a sample, by key of `data`."""
    if side == "text":
        return {
            "caption": data.caption,
            "tokenizer": tokenizer.fingerprint(),
            "context_length": data.context_length,
        }
    return {name: getattr(data, name) for name in ("image_size", "max_image_pixels", "max_image_mib")} | {
        name: list(getattr(data, name)) for name in ("image_mean", "image_std")
    }


def about_of(key: str, file: Path) -> dict[str, Any]:
    """What a file of features says of itself.

    Raises:
        UserError: nothing, or too little.
    """
    beside = file.with_name(f"{file.name}.json")
    try:
        about: dict[str, Any] = json.loads(beside.read_text("utf-8"))
        whole = isinstance(about[FINGERPRINT], str) and about["dtype"] in STORED
        whole &= all(isinstance(sample, int) for sample in about["bad"])
        {name: about[name] for name in ("tower", "precision", "reads", "width")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{key}: {beside}: expected what embed writes beside the features of a tower, got "
            f"{type(error).__name__}: {error}; {_AGAIN}"
        ) from error
    if not whole:
        raise UserError(f"{key}: {beside}: expected what embed writes beside the features of a tower; {_AGAIN}")
    return about
