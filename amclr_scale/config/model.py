"""The part of the recipe that says what is trained: `model`. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from amclr_scale.config.section import Fraction, Positive, PositiveNumber, Section


class Tap(Section):
    """An inner layer of a tower, whose features objectives compare too (objective.layers)."""

    module: str
    """Name of a module of the tower, such as blocks.11.mlp.fc1 of a ViT of timm's; of a text tower, of the model inside
    of it. Another name is answered with those that there are."""
    of: Literal["output", "input"] = "output"
    """What is read: what the module gives, or what it gets."""
    pooling: Literal["default", "mean", "first", "last"] = "default"
    """How features of tokens become one: mean, over words, or over patches without the token of the class; first, which
    is that token; last, of texts. default: mean for images, as the tower for texts. Of a map it is always the mean."""
    head: Literal["linear", "mlp", "none"] = "linear"
    """Head from these features to the embedding's width; none: they are compared as they are, at their own width."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """A name alone is a tap of it."""
        return {"module": value} if isinstance(value, str) else value


class Trained(Section):
    """What of a tower trains, and what of it objectives see: the last keys of both towers.

    A class has the keys of its last base first. So a tower names this one before the base with its own keys.
    """

    frozen: bool = False
    """Whether the tower keeps its weights: no gradient, no moments, no decay, no second pass of the gradient cache, and
    in evaluation mode, without dropout and with stored statistics. All of it, but for these:"""
    unfrozen_blocks: Annotated[int, Field(ge=0)] = 0
    """Of a frozen tower, the last so many blocks are trained all the same, with what comes after them."""
    unfrozen_norms: bool = False
    """Whether gains and biases of all norms of a frozen tower are trained all the same."""
    frozen_head: bool = False
    """Whether the head keeps its weights."""
    taps: list[Tap] = Field([])
    """Inner layers whose features objectives get beside the embeddings: names of modules, or sections with module, of,
    pooling and head. As many for images as for texts; objective.layers gives their weights."""


class OfImages(Section):
    """The image encoder's own keys."""

    name: str = "small_resnet"
    """small_resnet (for CPU), torchvision/NAME (such as torchvision/resnet50), timm/NAME, transformers/PATH (a local
    folder: its vision model), transformers/TYPE (that type's default size, random weights), open_clip/NAME (random
    weights, its projection included: projection none), or one that was added."""
    width: Positive = 16
    """small_resnet: channels of the first stage."""
    depth: Positive = 10
    """small_resnet: 10 or 18 layers."""
    norm: Literal["default", "group", "batch", "sync", "frozen"] = "default"
    """Normalisation of convolutional towers. batch: each rank's micro-batch by itself, which breaks the invariance to
    ranks and micro-batch; sync: over all ranks (not under the gradient cache); frozen: stored statistics; group: per
    sample. default: group for small_resnet, the library's own elsewhere (a BatchNorm there must be chosen by name)."""
    options: dict[str, Any] = Field({})
    """timm/NAME: keywords of that model, such as {drop_path_rate: 0.1} (stochastic depth) or {patch_drop_rate: 0.5}
    (patch dropout, as in FLIP and CLIPA)."""
    weights: str | None = None
    """Local file (.safetensors, .pt) with the tower's weights; null: random."""
    pretrained: bool = False
    """transformers/PATH: load the weights in that folder."""
    projection: Literal["linear", "mlp", "none"] = "linear"
    """Head from the tower's features to the embedding. none: these are the embedding."""
    dropout: Fraction = 0.0
    """Dropout before the head."""


class ImageTower(Trained, OfImages):
    """The image encoder."""


class OfTexts(Section):
    """The text encoder's own keys."""

    name: str = "small_transformer"
    """small_transformer (for CPU), or transformers/PATH: a local folder with config.json (and weights, used when
    `pretrained`), or transformers/TYPE such as transformers/distilbert for that type's default size, random weights;
    open_clip/NAME (random weights, projection included); or one that was added."""
    width: Positive = 64
    """small_transformer: width."""
    layers: Positive = 1
    """small_transformer: number of blocks."""
    heads: Positive = 2
    """small_transformer: attention heads."""
    pretrained: bool = False
    """transformers/PATH: load the weights in that folder."""
    pooling: Literal["default", "mean", "first", "last", "model"] = "default"
    """How token features become one: mean over tokens, the first or the last one. default: mean for small_transformer,
    first for BERT-like models, last for causal ones. model, of transformers: as that model pools by itself."""
    projection: Literal["linear", "mlp", "none"] = "linear"
    """Head from the tower's features to the embedding. none: these are the embedding."""
    dropout: Fraction = 0.0
    """Dropout inside small_transformer and before the head."""


class TextTower(Trained, OfTexts):
    """The text encoder."""


class Momentum(Section):
    """A moving average of the trained weights: to be evaluated, and to lend features to objectives."""

    decay: Fraction = 0.995
    """m: after every step the average becomes m * average + (1 - m) * weights. Kept in fp32, of the fp32 masters."""
    decay_schedule: Literal["constant", "cosine"] = "constant"
    """Course of m over the run. cosine: from start_decay to decay, half a cosine."""
    start_decay: Fraction | None = None
    """decay_schedule cosine: where m begins."""
    order: Literal["first", "last"] = "first"
    """Whether the average encodes the batch before the trained weights do, or after them. The numbers are the same;
    first takes less memory where graphs of micro-batches are kept."""
    precision: Literal["run", "fp32"] = "run"
    """What the average computes in; it is kept in fp32 all the same. run: as execution.precision says."""
    scale: bool = False
    """Whether the learned scale is averaged too, or is that of the trained weights."""
    buffers: Literal["average", "copy"] = "average"
    """Stored statistics of BatchNorm: averaged as the weights are, or the present ones. The average computes with
    these: it is always in evaluation mode."""


class Model(Section):
    """Two towers, two heads, one learned scale."""

    init: str | None = None
    """A whole dual encoder to start from: a run or an export of ours, a local folder of transformers (CLIP, SigLIP,
    Chinese-CLIP, VisionTextDualEncoder), open_clip/ARCHITECTURE:FILE, open_clip/FOLDER, or one of these on the Hugging
    Face hub: OWNER/NAME[@REVISION], hf-hub:OWNER/NAME, ARCHITECTURE/TAG of open_clip. Towers, heads, scale, tokenizer,
    sizes and pixel statistics are those of the model there (docs/encoders.md); null: random weights, but for towers
    that name some."""
    embedding_width: Positive = 128
    """D, the width of the common space."""
    image: ImageTower = ImageTower()
    text: TextTower = TextTower()
    temperature: PositiveNumber = 0.07
    """Start value of the learned temperature; logit_scale = 1 / temperature is clamped to [1, 100] after each step."""
    logit_bias: float = -10.0
    """Start value of the learned bias (objectives that have one: siglip)."""
    momentum: Momentum | None = None
    """A moving average of the weights, such as {decay: 0.995}; null: none. Lends image_momentum and text_momentum to
    objectives that ask for them."""
