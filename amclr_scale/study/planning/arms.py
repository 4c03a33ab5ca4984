"""The arms of a study: what is compared, and the controls that say what a difference comes from.

An arm is a list of configuration words laid over the plan's configuration; everything it does not name is shared by
all arms. Numbers in words may be given as `B` (the cell's global batch size), `B/k`, or `smallest` (the smallest batch
size of the plan). A plan may add arms of its own: a known one with further words.
"""

from dataclasses import dataclass

# AmCLR's further views (arXiv:2412.07979): one of eight operations on the base view of the image; another caption.
VIEWS = (
    "data.image_views=1",
    "data.text_views=1",
    "data.image_view_from=base",
    "data.image_view={amclr: 1.0, crop_scale: [1, 1], flip: 0}",
)


@dataclass(frozen=True)
class Control:
    """A known arm.

    Attributes:
        label: as tables and plots have it.
        words: overrides of the configuration.
        tells: what a comparison with it says.
    """

    label: str
    words: tuple[str, ...]
    tells: str


CONTROLS: dict[str, Control] = {
    "clip": Control("CLIP", ("objective.name=clip",), "the large-batch reference: InfoNCE both ways, B - 1 negatives"),
    "clip_strong": Control(
        "CLIP, strong recipe",
        (
            "objective.name=clip",
            "objective.label_smoothing=0.1",
            "data.augmentation.randaugment=[2, 9]",
            "model.image.projection=mlp",
            "model.text.projection=mlp",
            "model.image.dropout=0.1",
            "model.text.dropout=0.1",
        ),
        "whether a better recipe gives what a new objective claims (Fini et al., arXiv:2305.08675)",
    ),
    "clip_views": Control(
        "CLIP + views",
        ("objective.name=clip", "objective.omega=1", *VIEWS),
        "AmCLR's views and twice the encoder work under plain InfoNCE: what the views give without the estimator",
    ),
    "dcl": Control("DCL", ("objective.name=dcl",), "CLIP without the positive in the denominator"),
    "sogclr_gamma1": Control(
        "SogCLR, gamma 1",
        ("objective.name=sogclr", "objective.gamma=1.0"),
        "a check of the software: without memory SogCLR's gradient is temperature times DCL's",
    ),
    "sogclr": Control(
        "SogCLR",
        ("objective.name=sogclr", "objective.gamma=0.8"),
        "a moving average per sample over the whole data set; against DCL: what the average gives",
    ),
    "sogclr_augmented": Control(
        "SogCLR + augmentation",
        ("objective.name=sogclr", "objective.gamma=0.8", "data.augmentation.amclr=0.5"),
        "AmCLR's operations as plain augmentation of half the images, at SogCLR's encoder work",
    ),
    "isogclr": Control(
        "iSogCLR",
        (
            "objective.name=isogclr",
            "objective.gamma=0.8",
            "objective.temperature=0.05",
            "objective.temperature_min=0.01",
            "objective.temperature_max=0.1",
            "objective.rho=2.0",
            "objective.eta=0.003",
        ),
        "SogCLR with a temperature per sample; rho must lie below log(B - 1)",
    ),
    "amclr": Control(
        "AmCLR",
        ("objective.name=amclr", "objective.omega=1", "objective.gamma=0.8", "objective.reduce=mean", *VIEWS),
        "SogCLR over all pairings of two views per modality",
    ),
    "xamclr": Control(
        "xAmCLR",
        ("objective.name=xamclr", "objective.omega=1", "objective.gamma=0.8", "objective.reduce=mean", *VIEWS),
        "AmCLR and the pairings inside each modality",
    ),
    "amclr_dro": Control(
        "AmCLR-DRO",
        (
            "objective.name=amclr_dro",
            "objective.omega=1",
            "objective.gamma=0.8",
            "objective.reduce=mean",
            "objective.temperature=0.05",
            "objective.temperature_min=0.01",
            "objective.temperature_max=0.1",
            "objective.rho=2.0",
            "objective.eta=0.003",
            *VIEWS,
        ),
        "AmCLR with a temperature per sample: an open question of its paper",
    ),
    "cyclip": Control("CyCLIP", ("objective.name=cyclip",), "CLIP with cyclic consistency"),
    "accumulation": Control(
        "CLIP, accumulated",
        ("objective.name=clip", "objective.group_size=smallest"),
        "gradient accumulation without a cache: a gradient over B pairs, negatives from one small micro-batch",
    ),
    "local_negatives": Control(
        "CLIP, local negatives",
        ("objective.name=clip", "objective.group_size=B/8"),
        "eight ranks that do not gather: each contrasts its own share",
    ),
    "grouped2": Control(
        "CLIP, 2 groups", ("objective.name=clip", "objective.group_size=B/2"), "negatives from half the batch"
    ),
    "grouped4": Control(
        "CLIP, 4 groups", ("objective.name=clip", "objective.group_size=B/4"), "negatives from a quarter of the batch"
    ),
}

# Names of the literature that leave too much open to be arms: asking for one is answered with what to write.
ABSENT = {
    "queue": (
        "its size is to be chosen: {name: queue, like: clip, words: [objective.name=fifo_bank, objective.size=512]}"
    ),
    "momentum": (
        "its size and decay are to be chosen: {name: momentum, like: clip, words: [objective.name=momentum_queue, "
        "objective.size=512, 'model.momentum={decay: 0.99}']}"
    ),
}
