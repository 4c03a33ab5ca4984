"""The recipe: what is computed. Every key of `data model optimizer train`. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from amclr_scale.config.augmentation import ImageAugmentation, TextAugmentation
from amclr_scale.config.optimizers import RULES, UpdateRule
from amclr_scale.config.section import Fraction, Names, Positive, PositiveNumber, Section
from amclr_scale.config.text_rules import TEXT_RULES
from amclr_scale.errors import did_you_mean, one_of


class Features(Section):
    """Features of towers that are frozen as a whole, made beforehand: then these towers are not run in training."""

    image: str | None = None
    """The .npy that amclr-scale embed --config RECIPE writes: what the frozen image tower gives for every sample."""
    text: str | None = None
    """The same of the frozen text tower."""


class Data(Section):
    """Which pairs, in which order, as which tensors."""

    train: str | list[str] | Names = "emoji/train"
    """Shards to train on: a split of the embedded corpus (emoji/train), an index .json, a folder with an index.json,
    or shard paths with brace patterns ({00000..00099}.tar). Several: a list, ids follow one another. By name, for cards
    and reports: {photos: /data/photos}; without names they are called as their folders are."""
    lanes: Positive = 8
    """Independent streams that the data set is cut into; the number of ranks must divide it."""
    weights: list[PositiveNumber] | None = None
    """How often an epoch passes over each name of a list in `train`, such as [1, 2, 0.5]; null: once. Fractional passes
    go on in the next epoch."""
    shuffle_window: Positive = 16
    """Shards whose samples are mixed with one another inside a lane. Costs 16 bytes per sample and worker; of remote
    shards, the cache must hold two windows of every lane."""
    batches: Literal["random", "similar"] = "random"
    """Which samples meet: any, or those of one of the `communities` (B3)."""
    communities: str | None = None
    """For batches: similar, which community every sample is in: the .npy that amclr-scale shards communities wrote."""
    image_size: Annotated[int, Field(gt=0, le=2**14)] = 224
    """Side of the square image that the image tower sees, in pixels."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Channel means for normalisation, on the device (default: CLIP's)."""
    image_std: tuple[PositiveNumber, PositiveNumber, PositiveNumber] = (0.26862954, 0.26130258, 0.27577711)
    """Channel standard deviations for normalisation."""
    augmentation: ImageAugmentation = ImageAugmentation()
    """Of the base view of every image."""
    tokenizer: str = "emoji"
    """emoji (byte-pair encoding trained on the embedded corpus), clip (needs open_clip_torch), a tokenizer.json, or a
    local folder of a transformers tokenizer."""
    context_length: Annotated[int, Field(ge=4)] = 32
    """Tokens per caption; longer ones are cut, shorter ones padded."""
    caption: str | Annotated[list[str], Field(min_length=1)] = "txt"
    """Where a sample's caption is: txt, or json.FIELD (a string, or a list of which one is drawn per epoch). A list of
    such places: every epoch draws the place too; evaluation uses the first, which every sample must have."""
    image_id: str | None = None
    """Where samples that share an image say which: json.FIELD, numbers 0, 1, ... per data set (amclr-scale shards make
    writes image_id). Per-sample state of images then goes by image, that of texts by sample; null: one caption per
    image."""
    labels: str | None = None
    """Where samples say of which class they are, for objectives that ask (supcon): json.FIELD, words or numbers. Equal
    ones are one class; a sample that has nothing there is in none."""
    image_reference: str | list[str] | None = None
    """Features of every sample's image from a frozen model, for objectives that ask (cwcl): the .npy that amclr-scale
    embed MODEL --shards wrote for the same shards. A list: one file for each name in `train`."""
    text_reference: str | list[str] | None = None
    """The same of captions (embed --side text)."""
    features: Features = Features()
    image_views: Annotated[int, Field(ge=0)] = 0
    """Further augmented views of every image (AmCLR's omega)."""
    image_view: ImageAugmentation | None = None
    """How further image views are made; null: like the base view, from other random numbers."""
    image_view_from: Literal["image", "base", "group"] = "image"
    """What further image views show: the image, its base view (AmCLR), or another image of its `image_group`."""
    image_group: str | None = None
    """Where samples say what they show, such as json.concept: for image_view_from group."""
    image_negatives: Annotated[int, Field(ge=0, le=16)] = 0
    """Pictures of every sample that its caption does not show, though they look like it (negclip): hard negatives."""
    image_negative: str | Annotated[list[str], Field(min_length=1)] = "neg.png"
    """The member that they are in, such as neg.png; or a list of such, of which each epoch draws as many as it needs.
    They are augmented as the base view is."""
    text_views: Annotated[int, Field(ge=0)] = 0
    """Further captions of every sample, drawn from `text_view`."""
    text_view: str | list[str] = "json.captions"
    """Where further captions come from: json.FIELD (a string or a list), `paraphrases`, or a list of such places."""
    text_augmentation: TextAugmentation = TextAugmentation()
    """Word-level changes to further captions."""
    text_negatives: Annotated[int, Field(ge=0, le=16)] = 0
    """Captions of every sample that are wrong by one change (negclip, count): hard negatives."""
    text_negative: str | Annotated[tuple[str, ...], Field(min_length=1)] = TEXT_RULES
    """Where these come from: `words` (two change places), `attribute` (a colour, a size, ... becomes another), `number`
    (two to ten), json.FIELD (a string or a list); or a list of such, of which one is drawn each time."""
    paraphrases: str | None = None
    """Folder that amclr-scale shards paraphrase wrote for these shards: makes `paraphrases` a place for text_view."""
    max_bad_fraction: Fraction = 0.01
    """Share of unreadable samples past which the run stops. Each is replaced by another sample, and logged."""
    max_image_pixels: Positive = 100_000_000
    """Images with more pixels count as unreadable: decompression bombs."""
    max_image_mib: Positive = 1024
    """Images that would take more MiB while they are decoded count as unreadable: by pixels, mode and format."""
    max_caption_characters: Positive = 10_000
    """Longer captions count as unreadable."""
    cache: str | None = None
    """Folder for unpacked shards, fetched shards and indexes that training had to make; null: amclr_scale in
    $XDG_CACHE_HOME or ~/.cache. Does not change results."""
    cache_gib: PositiveNumber = 50.0
    """Bound on the fetched and unpacked shards in the cache, per machine, in GiB. Does not change results."""
    max_shard_gib: PositiveNumber = 100.0
    """Larger shards are refused while they are fetched or unpacked. Does not change results."""
    stream: bool = False
    """Remote shards go through shared memory instead of the cache: read front to back, two windows per lane held
    at once, fetched again in every epoch. Does not change results."""
    resident: Literal["none", "host", "device"] = "none"
    """Hold all samples decoded: in memory, or on every device too; captions alone, tokenised, beside features.image.
    Does not change results."""
    augment_on: Literal["workers", "device"] = "workers"
    """Who crops, resizes and changes images: the processes that decode them, or the device, to the same bytes. For
    GPUs that wait for data. Does not change results."""
    allow_pipe: bool = False
    """Whether shards named pipe:COMMAND may run that shell command."""

    @property
    def images_each(self) -> int:
        """What the image tower encodes of every sample."""
        return 1 + self.image_views + self.image_negatives

    @property
    def texts_each(self) -> int:
        """What the text tower encodes of every sample."""
        return 1 + self.text_views + self.text_negatives


class LearningRateFactors(Section):
    """Multipliers of the learning rate for parts of the model; 0 freezes a part: no gradient, no moments, no decay."""

    image_tower: Annotated[float, Field(ge=0)] = 1.0
    """Of the image encoder."""
    text_tower: Annotated[float, Field(ge=0)] = 1.0
    """Of the text encoder."""
    heads: Annotated[float, Field(ge=0)] = 1.0
    """Of both projection heads, and of an objective's own parts unless it says otherwise."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of logit_scale, logit_bias and generated temperatures."""


class Optimizer(Section):
    """Update rule and learning-rate schedule. Schedules count samples, not steps."""

    name: str = "adamw"
    """Update rule: one of those listed below, with the keys that each reads."""
    lr: PositiveNumber = 1e-3
    """Peak learning rate, at this global batch size or, with `lr_rule`, at `lr_reference_batch`."""
    lr_rule: Literal["none", "sqrt", "linear"] = "none"
    """How lr grows with the global batch size B: not at all, by sqrt(B / reference), or by B / reference."""
    lr_reference_batch: Positive = 256
    """The batch size that lr is meant for when lr_rule is sqrt or linear."""
    lr_factors: LearningRateFactors = LearningRateFactors()
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each block of a tower learns at this multiple of the rate of the block after it, the last one at this multiple of
    what follows the blocks, and what precedes them once more (ELECTRA, BEiT)."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the cosine or of the cooldown; inverse_sqrt does not fall below it."""
    schedule: Literal["cosine", "constant", "step", "inverse_sqrt"] = "cosine"
    """Course of the learning rate after warm-up. constant with cooldown_samples is what is called WSD (warm-up, stable,
    decay); inverse_sqrt: lr / sqrt(1 + t / timescale_samples), t samples after warm-up."""
    cooldown_samples: Annotated[int, Field(ge=0)] = 0
    """schedule constant and inverse_sqrt: the last samples of the run, over which the rate falls to min_lr."""
    cooldown_shape: Literal["linear", "sqrt"] = "linear"
    """How it falls, with s going from 0 to 1: by 1 - s, or by 1 - sqrt(s)."""
    timescale_samples: Positive | None = None
    """schedule inverse_sqrt: samples after which the rate is 1 / sqrt(2) of its peak; null: warmup_samples."""
    step_samples: tuple[Positive, ...] = ()
    """schedule step: the samples seen at which the learning rate is multiplied by step_factor."""
    step_factor: PositiveNumber = 0.1
    """schedule step: the multiplier at each of step_samples."""
    warmup_samples: Annotated[int, Field(ge=0)] = 0
    """Samples over which the learning rate rises linearly from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled, whatever the rule: a weight shrinks by lr * weight_decay per step (adamp: by a tenth of that where it
    takes a weight as scale-invariant). Never on biases, norms, positions, learned tokens and scales: environment.json
    lists them."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay of the first and second moment (all Adam-like rules, lion)."""
    momentum: Fraction = 0.9
    """sgd, lars: momentum."""
    nesterov: bool = True
    """sgd, adamp: Nesterov's look-ahead."""
    eps: PositiveNumber = 1e-8
    """Adam's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.0
    """Gradients are scaled down to this global L2 norm; 0: no clipping."""
    options: dict[str, Any] = Field({})
    """Keys of the rule's own, where it has some."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in RULES:
            raise ValueError(f"expected {one_of(RULES)}{did_you_mean(name, RULES)}")
        return name

    @property
    def rule(self) -> UpdateRule:
        """What `name` stands for."""
        return RULES[self.name]


class Train(Section):
    """How much, and in which portions."""

    global_batch_size: Annotated[int, Field(ge=2)] = 128
    """Pairs contrasted with one another in one step, over all ranks. The only batch size of the recipe."""
    samples: Positive | None = None
    """Length of the run in samples seen. Give this or `epochs`."""
    epochs: PositiveNumber | None = None
    """Length of the run in passes over the data. Give this or `samples`."""
    max_hours: PositiveNumber | None = None
    """Hours after which this process saves and ends with exit code 75, to be resumed; null: none. Does not change
    results."""
