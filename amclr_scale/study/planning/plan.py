"""The plan of a study: which arms, at which batch sizes, with which seeds, and what is held equal. Imports no torch.

load.py reads one from a YAML file.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from amclr_scale.config.schema import Fraction, Positive, PositiveNumber, Section
from amclr_scale.study.planning.amounts import Amount, amount

Axis = Annotated[list[Any], Field(min_length=1)]
RANKS = "execution.ranks"  # the one axis that is no key of the configuration
SWEPT = "optimizer.lr"  # an axis to choose from, not to compare
WARMUP = "optimizer.warmup_samples"
TUNING_SEEDS = 3
Role = Literal["scored", "tuning"]


class Communities(Section):
    """How communities of similar samples are grown, as by `amclr-scale shards communities`."""

    size: Annotated[int, Field(ge=2)] = 32
    """K, samples of a community."""
    skip: Annotated[int, Field(ge=0)] = 30
    """p, nearest texts to pass over: false negatives."""
    neighbours: Positive = 100
    """m, texts behind them that a sample points to."""


class ArmPlan(Section):
    """One arm: a known one by its name alone, or with words of its own."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
    """How cells and tables call it; unique in the plan."""
    like: str | None = None
    """The known arm it begins as; null: the one with this name."""
    label: str | None = None
    """As tables and plots have it; null: the known arm's, or its name where another arm has that. Arms that are given
    one label are one method at different batch sizes, such as CLIP with words of its own at a large one: one row, one
    curve."""
    words: tuple[str, ...] = ()
    """Further overrides of the configuration, section.key=value; B, B/k and smallest stand for batch sizes."""
    batch_sizes: list[Positive] | None = None
    """Global batch sizes of this arm; null: the plan's."""
    axes: dict[str, Axis] = Field(default_factory=dict)
    """Configuration keys and their values, for this arm only."""
    features_of: str | None = None
    """A cell of an arm above: this arm is trained beside what that one makes of data.train, which words name as
    FEATURES/image.npy, FEATURES/text.npy and FEATURES/communities.npy. clip-B64-s0, or clip-B64 for the one of the same
    seed. It is trained first; its training is not counted as this arm's."""
    communities: Communities = Communities()
    """How FEATURES/communities.npy is made."""
    budget_factor: PositiveNumber = 1.0
    """This arm gets so many times the plan's budget, such as 2 for SogCLR with as much encoder work as AmCLR."""


class Budget(Section):
    """How much training a cell gets; which key counts is said by `held_equal`."""

    samples: Positive | None = None
    """held_equal samples, memory, grid: samples seen; compute: those of an arm with one view per modality."""
    epochs: PositiveNumber | None = None
    """The same in passes over the data."""
    steps: Positive | None = None
    """held_equal steps: optimizer steps."""
    flops: PositiveNumber | None = None
    """held_equal compute: useful FLOPs of both towers, forward and backward, of every cell."""
    hours: PositiveNumber | None = None
    """held_equal wall_clock: hours of training on this machine, from the rate that a pilot measures."""
    pilot_steps: Annotated[int, Field(ge=5)] = 30
    """Steps of the pilot of every arm and batch size (--pilot; held_equal wall_clock needs one); the first three are
    not counted."""
    gib: PositiveNumber | None = None
    """held_equal memory: peak GiB per rank; each arm gets the largest of its batch sizes that fits."""


class LearningRate(Section):
    """The learning rate over batch sizes."""

    base: PositiveNumber | None = None
    """At the reference batch; null: the configuration's optimizer.lr."""
    rule: Literal["none", "sqrt", "linear"] | None = None
    """How it grows with the global batch size: not at all, by sqrt(B / reference), or by B / reference; null: the
    configuration's optimizer.lr_rule."""
    reference_batch: Positive | None = None
    """The batch size that `base` is meant for; null: the configuration's optimizer.lr_reference_batch."""


class Metric(Section):
    """An outcome: the mean of one or more results of evaluation.json."""

    name: str
    """As tables have it."""
    keys: Annotated[list[str], Field(min_length=1)]
    """Names in evaluation.json, such as emoji/val_style/image_to_text_R@1."""

    @property
    def lower_is_better(self) -> bool:
        return all(key.endswith("median_rank") for key in self.keys)

    @property
    def splits(self) -> set[str]:
        """What it is measured on."""
        return {key.rpartition("/")[0] for key in self.keys}


class Tuning(Section):
    """How the learning rate of an arm is chosen where axes have several values of optimizer.lr."""

    seeds: list[int] | None = None
    """Seeds that choose and that no verdict uses: every value runs with each of them, then the best one with each of
    `seeds`. null: three, after the largest of `seeds`. Two or more, so that they show how sure the choice is. []: no
    tuning; every value runs with each of `seeds`, intervals are too narrow, and nothing is said to match."""
    metric: Metric | None = None
    """What the best one is chosen by: a result on a validation split, which no outcome uses, such as
    emoji/val_concept/R@mean. null: the first outcome; then nothing is said about new test items."""


class Reference(Section):
    """What every other cell is compared with."""

    arm: str = "clip"
    """An arm of the plan."""
    global_batch_size: Positive | None = None
    """One of its batch sizes; null: the largest."""


class Execution(Section):
    """How cells are run. Changes no result."""

    launcher: Literal["python", "deepspeed", "torchrun"] = "python"
    """python: one rank per cell."""
    ranks: Positive = 1
    """Ranks of every cell, where the axis execution.ranks does not say it cell by cell."""
    ranks_per_node: Positive = 8
    """Of a SLURM job."""
    device: Literal["cpu", "cuda"] = "cuda"
    """Where cells run, for the prediction of memory; the runs themselves take what they find."""
    jobs: Positive = 1
    """Cells that run at once on this machine; on GPUs, each has its own."""
    threads: Positive | None = None
    """CPU threads per rank; null: the machine's cores over all ranks that run at once."""
    words: tuple[str, ...] = ()
    """Overrides of `execution`, `checkpoint`, `run` and `deepspeed` for every cell."""
    words_by_batch: dict[int, tuple[str, ...]] = Field(default_factory=dict)
    """Further ones by global batch size, such as {32768: [execution.micro_batch_size=512]}."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Further attempts at a cell that fails, unless its message is about the configuration (exit code 2)."""
    grace_seconds: PositiveNumber = 120.0
    """How long cells may take to save their state when the study is asked to end."""


class Expected(Section):
    """How long the study should take somewhere, before anything has been measured here."""

    device: str | None = None
    """A device of amclr_scale/metrics/devices.yaml, such as H100; hours then follow from FLOPs and utilisation."""
    count: Positive = 1
    """How many of them work at once."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Assumed share of their peak that useful operations reach, second forwards and waiting included."""
    samples_per_second: PositiveNumber | None = None
    """Instead: samples of an arm with one view per modality, over all cells that run at once."""
    seconds_per_cell: Annotated[float, Field(ge=0)] = 0.0
    """With samples_per_second: what every cell takes besides, for its start and its evaluation."""
    measured_on: str = ""
    """Where that rate was measured."""


class StudyPlan(Section):
    """One study."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Of the study; its folder is studies/NAME."""
    question: str = ""
    """What it is to answer, in a sentence: printed, and the head of the report."""
    config: str
    """The configuration that all arms share: a YAML file, relative to the plan's folder, or a shipped one's name."""
    words: tuple[str, ...] = ()
    """Overrides of the configuration for all arms."""
    arms: Annotated[list[ArmPlan], Field(min_length=1)]
    """Names of known arms, or mappings with a name and words."""
    batch_sizes: Annotated[list[Positive], Field(min_length=1)]
    """Global batch sizes."""
    group_sizes: tuple[Positive, ...] = ()
    """held_equal grid: pairs that share negatives, beside every batch size at least as large: gradients over B pairs,
    negatives from a group. Arms whose objective has no such groups (as clip has, by group_size) use the whole batch."""
    seeds: Annotated[list[int], Field(min_length=1)]
    """Seeds: initial weights, data order, augmentation. The same for every arm, so that arms are compared in pairs.
    Those of verdicts; tuning.seeds are others."""
    axes: dict[str, Axis] = Field(default_factory=dict)
    """Further configuration keys and their values, such as objective.gamma: [0.2, 0.8]. An option of the objective
    is varied in the arms that have it. execution.ranks, the ranks of a cell, is one too: the same recipe at another
    speed."""
    held_equal: Literal["samples", "steps", "compute", "wall_clock", "memory", "grid"]
    """What every cell gets the same amount of. There is no default: it decides what the study can say."""
    budget: Budget
    temperature: PositiveNumber | None = None
    """One fixed temperature for every arm that has one for all samples; null: as the configuration and arms say."""
    lr: LearningRate = LearningRate()
    tuning: Tuning = Tuning()
    warmup_samples: Annotated[int, Field(ge=0)] | None = None
    """Warm-up in samples; null: warmup_share, else the configuration's. An arm's words go before it."""
    warmup_share: Fraction | None = None
    """Warm-up as a share of each cell's samples."""
    num_samples: Positive | None = None
    """Pairs in the training data, N, where the data is not on this machine yet; null: read from its index."""
    metrics: Annotated[list[Metric], Field(min_length=1)]
    """The outcomes. Verdicts are about the first one."""
    sigma: Amount | None = None
    """Standard deviation of the paired differences over seeds, from an earlier study, with its unit as the margin's;
    with it the plan says whether its seeds suffice for the margin."""
    margin: Amount
    """Two arms match when their difference lies within +- this. A number with its unit: 0.5 points (hundredths of a
    share, such as R@1), 2 ranks, or a plain number for outcomes that have no unit. Declared before the first
    comparison; at most half of what the reference scores above guessing."""
    reference: Reference = Reference()
    pairs: tuple[tuple[str, str], ...] = ()
    """Arms to compare beside that, such as [[amclr_dro, amclr]]: the first against the second at the same batch size
    and the same values of the axes that both have. A family of their own."""
    skip: tuple[str, ...] = ()
    """Cells to leave out, by name or pattern, such as xamclr-B4096-*."""
    execution: Execution = Execution()
    folder: str | None = None
    """Of results; null: studies/NAME."""
    needs: str = ""
    """Data that is not part of this package, and how to make it: printed."""
    expected: Expected | None = None
    """From which to say how long it takes before a cell has run."""
    wandb_group: str | None = None
    """Group of the cells' runs in Weights & Biases, where run.wandb is on; null: the study's name."""

    @property
    def sweeps(self) -> bool:
        """Whether some arm has several learning rates to choose from."""
        return any(len(arm.axes.get(SWEPT, self.axes.get(SWEPT, []))) > 1 for arm in self.arms)

    @property
    def tuning_seeds(self) -> list[int]:
        """Seeds that learning rates are chosen on; none where nothing is swept."""
        if not self.sweeps:
            return []
        if self.tuning.seeds is not None:
            return self.tuning.seeds
        return [max(self.seeds) + place for place in range(1, TUNING_SEEDS + 1)]

    @property
    def criterion(self) -> Metric:
        """What learning rates are chosen by."""
        return self.tuning.metric or self.metrics[0]

    @property
    def equal_within(self) -> float:
        """The margin in the outcome's own unit, in which a share is one at most."""
        return amount(self.margin)[0]

    @property
    def place(self) -> Path:
        """The study's folder."""
        return Path(self.folder or f"studies/{self.name}")
