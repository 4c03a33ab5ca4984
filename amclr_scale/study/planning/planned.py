"""A cell of a study, before it runs, and the numbers that follow from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amclr_scale.config.load import recipe_hash
from amclr_scale.config.schema import Config
from amclr_scale.study.planning.cost import encoder_flops, matrices, negatives, pairwise_flops
from amclr_scale.study.planning.features import Features
from amclr_scale.study.planning.plan import Role, StudyPlan


@dataclass(frozen=True)
class Planned:
    """One cell, and the numbers that follow from it.

    Attributes:
        name: unique; also its run folder's.
        variant: the name without the seed.
        setting: the variant without a swept learning rate.
        role: whether it is scored, or chooses a learning rate for those that are.
        waits: it is scored at a learning rate that its tuning cells have yet to choose; `config` has another one.
        words: overrides of the study's configuration, all of them part of the recipe.
        config: with its `execution`, which is no part of the recipe.
        encoder_cost: forward passes of both towers per sample, relative to plain CLIP.
        ranks: it runs on.
        features: of another cell that it reads, which runs before it.
    """

    name: str
    variant: str
    setting: str
    role: Role
    waits: bool
    arm: str
    label: str
    global_batch_size: int
    seed: int
    axes: Mapping[str, Any]
    words: tuple[str, ...]
    config: Config = field(repr=False)
    samples: int
    steps: int
    epochs: float
    lr: float
    encoder_cost: float
    ranks: int
    features: Features | None = None

    @property
    def recipe_hash(self) -> str:
        return recipe_hash(self.config)

    @property
    def num_samples(self) -> int:
        """Of the data set."""
        return round(self.samples / self.epochs)

    @property
    def negatives(self) -> int:
        """Per anchor and term."""
        return negatives(self.config, self.num_samples)

    @property
    def comparisons(self) -> int:
        """Per anchor over all terms."""
        return matrices(self.config, self.num_samples) * self.negatives

    @property
    def flops(self) -> tuple[float, float]:
        """Useful operations of the whole cell: both towers, and the similarities."""
        pairs = pairwise_flops(self.config, self.num_samples)
        return encoder_flops(self.config) * self.samples, pairs * self.samples

    def entry(self) -> dict[str, Any]:
        """Its line in cells.json."""
        return {
            "cell": self.name, "role": self.role, "waits": self.waits, "arm": self.arm,
            "label": self.label, "global_batch_size": self.global_batch_size,
            "seed": self.seed, "axes": dict(self.axes), "recipe_hash": "" if self.waits else self.recipe_hash,
            "words": [] if self.waits else list(self.words), "samples": self.samples, "steps": self.steps,
            "epochs": round(self.epochs, 4), "lr": None if self.waits else self.lr,
            "encoder_cost": self.encoder_cost, "negatives": self.negatives, "comparisons": self.comparisons,
            "flops": sum(self.flops), "ranks": self.ranks, "features_of": self.features and self.features.of,
        }  # fmt: skip


def reference_of(plan: StudyPlan, cells: Sequence[Planned]) -> tuple[str, int]:
    """The arm and batch size that everything is compared with."""
    arm = plan.reference.arm
    batches = [cell.global_batch_size for cell in cells if cell.arm == arm]
    return arm, plan.reference.global_batch_size or max(batches, default=0)
