"""What a recipe measures: every key of `evaluation`. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from amclr_scale.config.section import Names, OneName, Positive, PositiveNumber, Section


class Probe(Section):
    """Classifiers that learn from frozen image features: a linear one, and nearest neighbours."""

    train: str | OneName
    """Labelled images to learn from, a path as in evaluation.splits, or with a name: {photos: /data/photos}."""
    test: str | OneName
    """Labelled images to measure on, likewise."""
    classes: str | None = None
    """Where a sample's class is in shards (json.FIELD or cls). Other formats bring their classes with them."""
    methods: list[Literal["linear", "knn"]] = Field(["linear", "knn"])
    """linear: logistic regression; knn: a weighted vote of the nearest training images."""
    features: list[Literal["embedding", "tower"]] = Field(["embedding", "tower"])
    """embedding: after the projection head; tower: before it."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training images on which penalty, neighbours and temperature are chosen."""
    l2: list[PositiveNumber] = Field([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    """Penalties to choose from, on the squared weights beside the mean loss."""
    neighbours: list[Positive] = Field([1, 5, 20, 200])
    """Numbers of neighbours to choose from."""
    neighbour_temperatures: list[PositiveNumber] = Field([0.02, 0.07, 0.1])
    """Temperatures of the vote to choose from."""


class Evaluation(Section):
    """What is measured, and when. The last step is always evaluated when something is to be measured."""

    splits: list[str] | Names = Field([])
    """Held-out pairs and labelled images for retrieval and zero-shot, as a list or by name: {photos: /data/photos}.
    Without names they are called as their folders are. emoji/val_style, an index, shards, a folder of CLIP_benchmark, a
    folder of pictures with a .txt beside each, a folder with one folder of images per class, CIFAR's binary files
    (FOLDER#train for that part), or annotations (.json, .jsonl): Karpathy's (FILE.json#val for another split than
    test), COCO's, or a list of {image, caption, [image_id], [negatives]} as ALBEF's and SogCLR's."""
    suites: dict[str, str | None] = Field({})
    """Suites of papers measured at the end of a run, by name, each with the folder that holds its data sets:
    {sugarcrepe: /data, datacomp38: /data/evalsets}; also clip_benchmark_vtab, retrieval, winoground and aro. As
    `amclr-scale evaluate RUN --suite NAME --data FOLDER` measures them, whatever the keys below say."""
    every_samples: Positive | None = None
    """Also evaluate each time that many samples have been seen; null: at the end only."""
    caption: str | None = None
    """Where a sample's captions are in shards, as data.caption; null: the same. All of a list, or of several lines,
    count."""
    resize: Literal["crop", "squash"] = "crop"
    """How an image becomes a square. crop: shorter side resized, centre cut out (CLIP, CLIP_benchmark); squash: both
    sides resized, nothing cut off, proportions lost (ALBEF, SogCLR, iSogCLR, AmCLR)."""
    clean_captions: bool = False
    """Retrieval and composition with captions as ALBEF, SogCLR, iSogCLR and AmCLR clean them: lower case, without
    , . ' ! ? " ( ) * # : ; ~, hyphens and slashes as spaces, at most 30 words. false: as they stand."""
    image_root: str | None = None
    """Folder that the image paths of annotations begin in; null: the annotation file's own folder."""
    classes: str | None = None
    """Zero-shot classification of shards: where a sample's class is (json.FIELD or cls). null: shards have none. Class
    folders, CIFAR and CLIP_benchmark bring their classes with them."""
    class_names: str | None = None
    """A file with one class name a line, or imagenet (1,000 names, needs open_clip_torch); null: the data set's own.
    Classes are found in it by name, or by number from 0 on, or by lines of `CLASS name`."""
    templates: list[str] | str | None = None
    """Prompts that a class name is put into, {} or {c} for the name; their normalised features are averaged. A list, a
    file with one a line, or imagenet (80 prompts, needs open_clip_torch). null: the data set's own, or customary
    ones."""
    batch_size: Positive = 256
    """Samples encoded at once per rank during evaluation; does not change results."""
    resamples: Annotated[int, Field(ge=0)] = 1000
    """Bootstrap resamples behind every 95 % interval; 0: no intervals."""
    momentum: bool = False
    """Also measure the moving average of the weights that model.momentum keeps; its numbers begin with momentum/."""
    sheet: Annotated[int, Field(ge=0)] = 0
    """Captions found, and as many missed, that a picture shows per split at the end of a run; 0: no picture."""
    geometry: bool = False
    """Also measure alignment, uniformity, modality gap, diversity, tolerance and effective rank of each split."""
    evaluators: list[str] = Field([])
    """Further evaluators of every split, beside retrieval, zero-shot, composition and geometry: names of
    evaluation/evaluators.py."""
    probes: list[Probe] = Field([])
    """Classifiers to learn from frozen features."""
