"""Every key of a configuration, documented where it is declared. Imports no torch.

A configuration has two halves. The *recipe* (`seed data model objective optimizer train evaluation`) says what is
computed; `execution` and `run` say how, where and how loudly. Changing only the second half does not change the
numbers beyond rounding. The global batch size is the only batch size in the recipe. Its parts are in `recipe`,
`evaluation` and `execution`, and everything is imported from here.
"""

from typing import Annotated, Any

from pydantic import Field

from amclr_scale.config.augmentation import ImageAugmentation, TextAugmentation
from amclr_scale.config.evaluation import Evaluation, Probe
from amclr_scale.config.execution import BatchProbe, Checkpoint, Execution, Run, Similarity
from amclr_scale.config.model import ImageTower, Model, Momentum, Tap, TextTower
from amclr_scale.config.recipe import (
    Data,
    LearningRateFactors,
    Optimizer,
    Train,
)
from amclr_scale.config.section import Fraction, Positive, PositiveNumber, Section, Words

__all__ = [
    "BatchProbe",
    "Checkpoint",
    "Config",
    "Data",
    "Evaluation",
    "Execution",
    "Fraction",
    "ImageAugmentation",
    "ImageTower",
    "LearningRateFactors",
    "Model",
    "Momentum",
    "Optimizer",
    "Positive",
    "PositiveNumber",
    "Probe",
    "Run",
    "Section",
    "Similarity",
    "Tap",
    "TextAugmentation",
    "TextTower",
    "Train",
    "Words",
]


class Config(Section):
    """One run."""

    seed: Annotated[int, Field(ge=-(10**12), le=10**12)] = 0
    """Of everything random: initial weights, order, augmentation, dropout."""
    data: Data = Data()
    model: Model = Model()
    objective: dict[str, Any] = Field({"name": "clip"})
    """name, and that objective's own options (docs/objectives.md)."""
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    execution: Execution = Execution()
    checkpoint: Checkpoint = Checkpoint()
    resume: str = "never"
    """never; auto: go on from the newest valid checkpoint of this recipe, in run.name if that is given, or begin where
    there is none; or a path or a url: a run folder or one of its checkpoints (docs/checkpoints.md)."""
    resume_changed: Words = Field([])
    """Keys of the recipe that may differ from the checkpoint's, such as resume_changed=optimizer.lr,train.epochs."""
    run: Run = Run()
    deepspeed: dict[str, Any] = Field({})
    """Further keys for DeepSpeed's own configuration; may not contradict what the keys above generate."""
