"""Classifiers that learn from frozen image features, on labelled images of one split, and are measured on another's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.config.schema import Probe
from amclr_scale.data.sources import paths_of
from amclr_scale.errors import UserError
from amclr_scale.evaluation.encode import Encode, encode_images
from amclr_scale.evaluation.frozen_features import linear, neighbours
from amclr_scale.evaluation.frozen_features.places import places
from amclr_scale.evaluation.numbers import Number
from amclr_scale.evaluation.shares import gather_rows, share
from amclr_scale.evaluation.splits import Task
from amclr_scale.evaluation.zero_shot import accuracies, accuracy_names

FEATURES = {"embedding": "image", "tower": "image_features"}


def probe_tasks(one: Probe, opened: Callable[..., Task]) -> tuple[Task, Task]:
    """The two labelled splits of a probe, which must agree about the classes."""
    tasks, named = [], dict[str, str]()
    for key, given in (("train", one.train), ("test", one.test)):
        (path,) = paths_of(given, f"evaluation.probes.{key}")
        try:
            task = opened(path, classes=one.classes)
        except UserError as error:  # whatever opens a split speaks of the keys that most of them have
            words = str(error).replace("evaluation.splits:", f"evaluation.probes.{key}:")
            words = words.replace("evaluation.classes:", "evaluation.probes.classes:")
            error.args = (words.replace(", or null for retrieval alone", ""),)
            raise
        named[key] = path
        if not task.class_names:
            raise UserError(
                f"evaluation.probes.{key}: expected labelled images, got {path}, which has no classes; of shards "
                "evaluation.probes.classes says where they are"
            )
        tasks.append(task)
    if tasks[0].class_names != tasks[1].class_names:
        raise UserError(
            f"evaluation.probes.test: {named['test']} has other classes ({len(tasks[1].class_names)}) than "
            f"{named['train']} ({len(tasks[0].class_names)})"
        )
    if tasks[0].split.num_samples < 2:
        raise UserError(
            f"evaluation.probes.train: expected at least 2 labelled images, to learn from some and choose on others, "
            f"got {tasks[0].split.num_samples} in {named['train']}"
        )
    return tasks[0], tasks[1]


def measure_probe(
    encode: Encode, options: Probe, train: Task, test: Task, size: int
) -> tuple[dict[str, Number], dict[str, float]]:
    """Both classifiers on both features: learn on `train`, choose on a part of it, measure on `test`."""
    outputs = [FEATURES[name] for name in options.features]
    asked: dict[str, Any] = {"features": True} if "tower" in options.features else {}
    encoded = [encode_images(encode, task.split, size, outputs, **asked) for task in (train, test)]
    rows, held = (share(task.split.num_samples) for task in (train, test))
    device, K = encoded[0][0].device, len(train.class_names)
    y = train.labels[rows.start : rows.stop].to(device)
    target = test.labels[held.start : held.stop].to(device)
    validation = held_out(train.split.num_samples, options.validation)[rows.start : rows.stop].to(device)
    numbers: dict[str, Number] = {}
    plain: dict[str, float] = {}
    for name, learned, measured in zip(options.features, *encoded, strict=True):
        x, z = F.normalize(learned.float(), dim=-1), F.normalize(measured.float(), dim=-1)
        suffix = "" if name == "embedding" else "_tower"
        if "linear" in options.methods:
            classifier, _ = linear.sweep(x, y, validation, K, options.l2)
            scores = classifier(z)
            numbers |= _accuracy(scores, target, test, f"probe{suffix}")
            plain[f"probe{suffix}_l2"] = classifier.l2
        if "knn" in options.methods:
            (k, t), _ = neighbours.sweep(
                x, y, validation, K, ks=options.neighbours, temperatures=options.neighbour_temperatures
            )
            scores = neighbours.vote(*neighbours.nearest(z, x, y, k), K, t)
            numbers |= _accuracy(scores, target, test, f"knn{suffix}")
            plain |= {f"knn{suffix}_neighbours": k, f"knn{suffix}_temperature": t}
    return numbers, plain


def held_out(n: int, share: float) -> Tensor:
    """Which of n >= 2 training images are chosen on: (n,) bool, at least one of them, and never all."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order[: min(max(1, round(share * n)), n - 1)]] = True
    return chosen


def numbers_of_probe(options: Probe, train: Task) -> set[str]:
    """What `measure_probe` will call its numbers, those that scores describe."""
    suffixes = ["" if name == "embedding" else "_tower" for name in options.features]
    methods = ["probe" if method == "linear" else method for method in options.methods]
    names = [f"{method}{suffix}" for method in methods for suffix in suffixes]
    return {number for name in names for number in accuracy_names(len(train.class_names), name=name)}


def _accuracy(scores: Tensor, target: Tensor, test: Task, name: str) -> dict[str, Number]:
    """Of all ranks' images."""
    return accuracies(gather_rows(places(scores, target)).cpu(), test.labels, len(test.class_names), name=name)
