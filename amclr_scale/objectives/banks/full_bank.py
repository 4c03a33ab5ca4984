"""One stored row for every sample and modality, as negatives and as what the sample's own embedding should stay near.

The bank of the whole data set of the notes "Increasing negative examples for ITC", after Wu et al., "Unsupervised
Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, arXiv:1805.01978, with two modalities.

With q_j and q'_j the stored rows of image j and text j, and K samples drawn for the step (or all of them) but i itself:

    L_i   = log( exp(s_ii / t) + sum_k exp(z_i . q'_k / t) ) - s_ii / t
    value = (1/2) mean_i (L_i + L'_i) + (proximal/2) mean_i ( |z_i - q_i|^2 + |t_i - q'_i|^2 )
    q_i  <- (momentum q_i + (1 - momentum) z_i) / |...|            q_i = z_i at first sight

With `batch_negatives`, sum_j exp(z_i . t_j / t) over the other pairs of the batch is added to the sums. For the first
`wait_epochs` passes over the data it is all that is there: rows are stored meanwhile, and are no negatives yet. While
embeddings still change as a whole, stored rows say when they were stored rather than whose they are, and anchors are
pushed from where all of them were an epoch ago.

A sample that has not been seen is no negative, and has no proximal term. All anchors of a step share the K samples that
are drawn. The rows get no gradient; the positive is the pair of the batch, and has one on both sides.

Numerics: as in CLIP. Where rows lie on the host, those that a step needs are fetched: K, or all of them piece by piece.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.objectives.banks.bank import Own
from amclr_scale.objectives.banks.count import Count
from amclr_scale.objectives.banks.queues import drift, proximal
from amclr_scale.objectives.base import Layout, Objective, at_least_float32, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.estimator import two_visits
from amclr_scale.objectives.layers import LayerOptions
from amclr_scale.objectives.sample_state import SampleState, Visit
from amclr_scale.objectives.staging import is_staged
from amclr_scale.similarity import ExtraKeys, all_sum, contrast
from amclr_scale.types import Embeddings, Loss

ROWS = "rows"  # the column


class HostState(SampleState):
    """A table that stays in host memory wherever the objective goes."""

    on_host = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostState":
        return self


class FullBank(Objective, name="full_bank"):
    """A stored row per sample as negatives, with a proximal term to the sample's own: NPID for two modalities."""

    stores_features = True
    drawn_option: ClassVar[str | None] = "negatives"
    whole_set_options: ClassVar[Mapping[str, Any]] = {"negatives": "all", "batch_negatives": False, "wait_epochs": 0.0}

    image_state: SampleState | None
    text_state: SampleState | None

    @dataclass(frozen=True, kw_only=True)
    class Config(LayerOptions):
        """Options of `full_bank`."""

        num_samples: int  # images in the data set
        num_texts: int | None = None  # texts in the data set, where that is another number
        width: int | None = None  # of the embeddings; null: as they come
        negatives: int | Literal["all"] = "all"  # samples that are drawn for a step; all: of the data set
        temperature: float | None = 0.07  # fixed; null: learned, 1 / logit_scale
        batch_negatives: bool = False  # the other pairs of the batch are negatives, too
        wait_epochs: float = 0.0  # passes over the data during which the batch's negatives are the only ones
        proximal: float = 30.0  # weight of the squared distance to the sample's own row
        key_gradient: bool = True  # false: positives as keys get no gradient, as stored rows get none
        momentum: float = 0.5  # weight of the old row in the new one
        device: Literal["gpu", "host", "sharded"] = "gpu"  # where rows are; sharded: cut over the ranks' GPUs

        def __post_init__(self) -> None:
            check_temperature(self.temperature)
            require(self.width is None or self.width > 0, "width", "the width of the embeddings, or null", self.width)
            require(self.proximal >= 0, "proximal", "a weight of at least 0", self.proximal)
            require(0 <= self.momentum < 1, "momentum", "a weight in [0, 1)", self.momentum)
            fits = self.batch_negatives or not self.wait_epochs
            require(fits and self.wait_epochs >= 0, "wait_epochs", "0, or more with batch_negatives", self.wait_epochs)
            if isinstance(self.negatives, int):
                require(self.negatives > 0, "negatives", "a number of samples, or all", self.negatives)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {"ids": True}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        stored = int(options.num_samples) - 1 if options.negatives == "all" else int(options.negatives)
        return stored + (B - 1 if options.batch_negatives else 0)

    @staticmethod
    def stored_rows_of(options: Any) -> int | Literal["all"]:
        drawn: int | Literal["all"] = options.negatives
        return drawn

    @staticmethod
    def mistakes_of(options: Any, B: int, b: int) -> Iterable[str]:
        if options.negatives != "all" and options.negatives < 1:
            yield f"negatives: expected a number of samples, or all, got {options.negatives}"

    def __init__(self, config: Config, sample_state: Layout = "auto") -> None:
        super().__init__(config)
        sizes = (("num_samples", config.num_samples), ("num_texts", config.num_texts or config.num_samples))
        for key, size in sizes:
            fits = config.negatives == "all" or config.negatives <= size
            require(fits, "negatives", f"at most {key} = {size}, or all", config.negatives)
        self.layout: Layout = "sharded" if config.device == "sharded" else sample_state
        self.image_state = self.text_state = None
        self.steps = Count()
        if config.width is not None:
            self.allocate(config.width)

    def allocate(self, width: int, device: torch.device | None = None) -> None:
        """Make the tables for rows of this width, unless they are there."""
        if self.image_state is not None:
            return
        config, kind = self.config, HostState if self.config.device == "host" else SampleState
        num_texts = config.num_texts or config.num_samples
        for side, size in (("image", config.num_samples), ("text", num_texts)):
            table = kind(size, {ROWS: 0.0}, width=width, layout=self.layout, of_texts=side == "text")
            setattr(self, f"{side}_state", table if device is None else table.to(device))

    def rehearse(self, width: int, slots: int) -> None:
        self.allocate(width)
        self.steps.value = 1

    def forward(self, embeddings: Embeddings) -> Loss:
        config, image, text = self.config, embeddings.image, embeddings.text
        width = image.shape[1]
        require(config.width in (None, width), "width", f"{width}, the width of the embeddings", config.width)
        self.allocate(width, image.device)
        assert self.image_state is not None
        assert self.text_state is not None
        t = learned_temperature(embeddings, config.temperature)
        visits = two_visits(embeddings, self.image_state, self.text_state)
        own = tuple(_own(visit) for visit in visits)
        ids = tuple(visit.ids for visit in visits)
        images, seen_images = self._keys(self.image_state, ids[0], own[0], 0)
        texts, seen_texts = self._keys(self.text_state, ids[1], own[1], 1)
        both = contrast(
            image, text, temperature=t, centred=True, batch_negatives=config.batch_negatives, extra_image_keys=images,
            extra_text_keys=texts, key_gradient=config.key_gradient,
        )  # fmt: skip
        loss = softmax_loss(both)
        if config.proximal:
            loss = loss + config.proximal * (proximal(image, own[0]) + proximal(text, own[1])) / 2
        if self.learns:
            for visit, rows, old in zip(visits, (image, text), own, strict=True):
                visit.write(**{ROWS: self._moved(rows.detach(), old)})
            self.steps.add(1)
        metrics = {
            "bank_seen": (seen_images + seen_texts) / 2,
            "bank_drift": drift((image, own[0]), (text, own[1])),
        }
        return Loss(loss, numbers(objective=loss, temperature=t, **metrics))

    def _moved(self, rows: Tensor, old: Own) -> Tensor:
        """What takes the place of the rows, (b, D)."""
        m, x = self.config.momentum, at_least_float32(rows)
        return torch.where(old.there[:, None], F.normalize(m * old.rows.to(x.dtype) + (1 - m) * x, dim=1), x)

    def _keys(self, table: SampleState, ids: Tensor, own: Own, side: int) -> tuple[ExtraKeys, Tensor]:
        """The step's negatives, less an anchor's own and those not seen; and the share of them that was seen."""
        num_shards, shard = table.shards
        held = table.held(ROWS)
        if self.config.negatives == "all":
            here, count, of_own = torch.arange(len(held)), table.num_samples, own.count
            rows = held if is_staged() else held.clone()  # in a plain loop backward comes after the rows have changed
        else:
            drawn = torch.tensor(draw(self.steps.value, side, table.num_samples, self.config.negatives))
            here, count = drawn[drawn % num_shards == shard] // num_shards, self.config.negatives
            rows = held[here.to(held.device)].to(ids.device)
            of_own = own.count * torch.isin(ids, drawn.to(ids.device))
        there = rows.any(1).to(ids.device)
        if self.epoch < self.config.wait_epochs:
            there, of_own = torch.zeros_like(there), torch.zeros_like(of_own)
        seen = all_sum(there.sum()) if num_shards > 1 else there.sum()
        numbers_of = (here * num_shards + shard).to(ids.device)
        keys = ExtraKeys(rows, numbers_of, ids, num_shards > 1, count, count - seen + of_own, there)
        return keys, seen.double() / count

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}image_state.{ROWS}")
        if saved is not None and len(saved.shape) == 2:
            self.allocate(saved.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def draw(step: int, side: int, size: int, count: int) -> list[int]:
    """Samples that are negatives at a step, the same on every rank: `count` of `size`, each at most once."""
    return random.Random(2 * step + side).sample(range(size), count)


def _own(visit: Visit) -> Own:
    rows = visit.read()[ROWS]
    return Own(rows.any(1).long(), rows)
