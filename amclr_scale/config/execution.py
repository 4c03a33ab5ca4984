"""How, where and how loudly a recipe is run. Nothing here changes its numbers beyond rounding. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from amclr_scale.config.backends import SIMILARITY_BACKENDS
from amclr_scale.config.section import Positive, PositiveNumber, Section
from amclr_scale.errors import did_you_mean, one_of


class Similarity(Section):
    """How the similarity engine works through B x B similarities. Never changes results beyond rounding."""

    chunk: Positive | Literal["auto"] = "auto"
    """Rows of similarities alive at once."""
    gather: Literal["all", "ring"] = "all"
    """all: gather every rank's features; ring: pass them round, memory for one rank's block only."""
    backend: str = "auto"
    """Who computes the blocks: torch anywhere; triton, fused kernels, on CUDA; or one that was added. auto: triton
    where it can, and the log says which."""
    precision: Literal["auto", "fp32", "split", "bf16"] = "auto"
    """Of the operands of matrix products; similarities, exponents and sums are float32 always. bf16: rounded; split:
    each number as a sum of two bfloat16, three products for one. auto: fp32 in a run of fp32 or tf32 and on CPUs,
    else split (docs/similarity.md says why, and what it costs)."""
    distribution: Literal["auto", "column_sums", "two_blocks", "reduce_scatter"] = "auto"
    """How ranks share the matrix products (docs/similarity.md)."""
    cache_mib: Annotated[int, Field(ge=0)] = 0
    """Memory per rank in MiB to keep similarity blocks in, instead of computing them again in backward."""

    @field_validator("backend")
    @classmethod
    def _known(cls, name: str) -> str:
        known = ("auto", *SIMILARITY_BACKENDS)
        if name not in known:
            raise ValueError(f"expected {one_of(known)}{did_you_mean(name, known)}")
        return name


class Execution(Section):
    """How the recipe is run. Nothing here changes the numbers beyond rounding."""

    auto: bool = False
    """`execution: auto`, or execution=auto as a word, sets it: at the start, choose the fastest zero_stage, offload,
    recomputation, micro_batch_size, kept_micro_batches, similarity.gather and similarity.chunk that the devices' free
    memory holds. What is given, in a file or as a word, stays as given."""
    micro_batch_size: Positive | None = None
    """Samples one rank encodes at once; null: its whole share of the global batch. When it is smaller, the gradient
    cache makes the step the same as with the whole share, at 4/3 of the cost."""
    text_micro_batch_size: Positive | None = None
    """Texts encoded at once, when not as many as images; null: micro_batch_size."""
    kept_micro_batches: Annotated[int, Field(ge=0)] | Literal["auto"] = 1
    """Micro-batches whose activations are kept between the two passes of the gradient cache: memory for less
    recomputation. With n micro-batches, k kept ones save k/n of the second forward. auto: as many as free memory holds
    by the memory account, the same number on every rank."""
    recompute_image: Literal["none", "full"] | Positive = "none"
    """Activation recomputation in the image tower: none, full (every block), or k: every k-th block."""
    recompute_text: Literal["none", "full"] | Positive = "none"
    """Activation recomputation in the text tower."""
    trim_texts: bool = False
    """Encode samples whose captions are of like length together, and cut every micro-batch of captions after its
    longest one, to a multiple of 8 tokens: padding that all of a micro-batch have is not computed. With BatchNorm in a
    tower, samples stay where they are. On a CPU towers always cut what they are given."""
    compile: bool = False
    """torch.compile both towers."""
    profile: Annotated[int, Field(ge=0)] = 0
    """Steps to profile (after the first three): torch.profiler traces in the run folder, and DeepSpeed's summaries of
    floating-point operations and of messages between ranks. 0: none."""
    memory_report: bool = False
    """Measure what the first three steps hold, by phase, beside what was predicted: memory.json and memory.md in the
    run folder, and on CUDA a snapshot for PyTorch's viewer (docs/memory.md)."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage, what is partitioned over ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also
    parameters."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep in host memory: optimizer states (stages 1 to 3), or parameters as well (stage 3)."""
    precision: Literal["fp32", "tf32", "amp_bf16", "bf16", "fp16"] = "fp32"
    """Of the towers. tf32: fp32 whose products round their operands to 10 bits (CUDA alone). amp_bf16: fp32 parameters,
    products in bf16 by torch.autocast. bf16, fp16: parameters and activations, with fp32 masters, which need zero_stage
    1 or more; fp16 scales the loss and skips steps that overflow. Similarities, log-sums and optimizer states stay
    fp32. docs/engine.md compares them."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes per rank that read and decode; 0: the rank itself. Does not change the batches."""
    threads: Positive | None = None
    """CPU threads per rank; null: the machine's cores over its ranks."""
    sample_state: Literal["auto", "replicated", "sharded"] = "auto"
    """Per-sample state of the objective: on every rank, or cut over ranks by id."""
    similarity: Similarity = Similarity()

    @property
    def halves_weights(self) -> bool:
        """Whether parameters are in half precision, beside fp32 masters."""
        return self.precision in ("bf16", "fp16")


class Checkpoint(Section):
    """When the whole state of a run is saved. One is saved at the end and before a signal ends the run, always."""

    every_samples: Positive | None = None
    """Save whenever so many samples more have been seen; null: by time alone."""
    every_minutes: PositiveNumber | None = 30.0
    """Save when the last save is so long ago; null: by samples alone."""
    keep: Positive = 2
    """Checkpoints that are kept: the newest ones."""
    keep_every: Positive | None = None
    """Every k-th checkpoint is kept for ever; null: none."""
    best: str | None = None
    """Also save and keep the checkpoint that scored best in this number of the evaluation, such as
    photos/image_to_text_R@1 (evaluation.every_samples says how often it is measured); checkpoints/best names it. null:
    none."""
    asynchronous: bool = True
    """Write beside training, from a copy in host memory; false: training waits for the disk."""
    on_failure: Literal["continue", "stop"] = "continue"
    """When one cannot be written (a full disk): say so and train on, or end the run. Earlier ones stay in any case."""
    max_failures: Positive | None = 3
    """Checkpoints in a row that cannot be written before the run ends all the same; null: it never does."""


class BatchProbe(Section):
    """Measure on a fixed set of training samples what batches get wrong (docs/objectives.md)."""

    samples: Annotated[int, Field(ge=0)] = 0
    """Samples in the set, a multiple of train.global_batch_size; 0: no probe. Each measurement encodes them all."""
    every_samples: Positive | None = None
    """Training samples between two measurements; null: one pass over the data. The end of a run is measured too."""


class Run(Section):
    """Where results go, and what is said meanwhile."""

    folder: str = "runs"
    """Run folders are made in here."""
    name: str | None = None
    """Name of this run's folder; null: configuration name, objective, batch size and time."""
    remote: str | None = None
    """Also keep run folders at this address of fsspec's, such as s3://bucket/runs: every checkpoint is uploaded beside
    training, and resume goes on from there (docs/checkpoints.md). Without weights of the end, which are in the last
    checkpoint; null: on the disk alone."""
    remote_minutes: PositiveNumber = 30.0
    """Minutes that the end of a run waits for the last upload."""
    shared: bool = True
    """Whether all ranks see the run folder; false: rank 0's node keeps the run, and is sent what other nodes have to
    write (docs/clusters.md)."""
    rendezvous_minutes: PositiveNumber = 5.0
    """Minutes that ranks wait for one another before a run begins; then all that have come end. A rank that is seen to
    get on with preparing its data (fetching, unpacking, indexing) is waited for longer."""
    prepare_minutes: PositiveNumber = 120.0
    """Minutes that ranks wait for one that is."""
    watch_minutes: PositiveNumber = 2.0
    """Minutes without a sign of life after which a rank, a node or the network counts as lost, and all ranks end;
    longer than the longest pause of a healthy rank."""
    log_every_steps: Positive = 10
    """Steps between two lines on the console and in metrics.jsonl."""
    diagnostics: bool = False
    """Also log, at each logged step, alignment, uniformity, modality gap, gradient norm per modality, the spread of
    per-sample temperatures, what the batch size does to a pair's gradient, and how many samples of the batch are
    duplicates or false negatives (docs/objectives.md)."""
    probe: BatchProbe = BatchProbe()
    wandb: Literal["off", "offline", "online"] = "off"
    """Also log to Weights & Biases; offline writes files to sync later."""
    wandb_project: str = "amclr_scale"
    """Project name there, and in trackio."""
    wandb_group: str | None = None
    """Runs of one group are shown together there; null: none."""
    tensorboard: bool = False
    """Also write TensorBoard's event files, into the run folder."""
    trackio: bool = False
    """Also log to trackio, on this machine; `trackio show` shows it."""
