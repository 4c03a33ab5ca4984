"""Folders of CLIP_benchmark: zero-shot classification with the numbers that DataComp counts, and retrieval.

Beside top k and the mean per class:

    f1_macro            mean over the classes that occur of F1 = 2 TP / (2 TP + FP + FN)     (WILDS: iWildCam)
    worst_group_top1    smallest top 1 of the groups that have samples         (FMoW's regions, GeoDE's regions)
    worst_group_top5    likewise top 5                                         (Dollar Street's groups of income)

A sample's group is a number in its .npy, as WILDS writes metadata. Of FMoW the region "Other" with its few pictures is
a group like the others, as in DataComp's published numbers. Ties count against the model, as in zero_shot.py: where
another class scores as high as the right one, that class is what was predicted.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from amclr_scale.data.evaluation_split import EvaluationSplit
from amclr_scale.data.sources import shards_in
from amclr_scale.errors import UserError
from amclr_scale.evaluation.class_names import lines_of
from amclr_scale.evaluation.encode import Encode
from amclr_scale.evaluation.evaluators import EncodedSplit, retrieval
from amclr_scale.evaluation.numbers import mean_of
from amclr_scale.evaluation.shares import gather_rows, share
from amclr_scale.evaluation.splits import Task, open_task
from amclr_scale.evaluation.suites.files import Files
from amclr_scale.evaluation.suites.opened import Measured, Opened, Place
from amclr_scale.evaluation.zero_shot import ROWS, accuracies, class_ranks

MOST = 2**53  # of a group's number, which a float64 may hold
_BESIDE = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt")


def check_folder(one: str, path: Path, *, classes: bool) -> None:
    """Raise `UserError` for a folder that cannot be measured, as far as can be seen without reading its shards.

    Args:
        one: the data set.
        classes: it has to have names of classes and templates.
    """
    shards = shards_in(path / "test") if (path / "test").is_dir() else []
    if not shards:
        raise UserError(
            f"--data: {one}: expected shards in {path / 'test'}, found none; take the folder away, or fill it"
        )
    told = lines_of(path / "test" / "nshards.txt")
    if told and told != [str(len(shards))]:
        raise UserError(
            f"--data: {one}: expected {told[0]} shards in {path / 'test'}, as its nshards.txt says, got {len(shards)}; "
            "download the rest"
        )
    for file in _BESIDE[:2] if classes else ():
        if not lines_of(path / file) or "" in _verbatim(path / file):
            raise UserError(f"--data: {one}: expected {path / file} with a line for each and no blank ones")
    if not classes and lines_of(path / _BESIDE[2]) != ["retrieval"]:
        raise UserError(f"--data: {one}: expected {path / _BESIDE[2]} with the line `retrieval`, found none")


def open_classes(place: Place) -> Opened:
    """Zero-shot classification of a folder."""
    # Names as they stand, underscores and all: so prompts are those of CLIP_benchmark.
    task = replace(_task(place), class_names=_verbatim(place.path / _BESIDE[0]))
    groups = _groups(place, task) if place.one.group is not None else None

    def measure(encode: Encode) -> Measured:
        seen = EncodedSplit(encode, task, place.options, {})
        assert seen.labels is not None
        ranks = class_ranks(seen.image, seen.classes, seen.labels)
        rivals = best_rivals(seen.image, seen.classes, seen.labels)
        numbers = accuracies(ranks, task.labels, len(task.class_names))
        plain = {"f1_macro": f1_macro(torch.where(ranks == 1, task.labels, rivals), task.labels)}
        if groups is not None:
            for k in (1, 5):
                by_group = group_shares(ranks <= k, groups)
                plain[f"worst_group_top{k}"] = min(by_group.values())
                plain |= {f"group_{group}_top{k}": value for group, value in by_group.items()}
        return numbers, plain

    prompts = len(share(len(task.class_names) * len(task.templates)))
    encoded = len(share(task.split.num_samples)) + prompts
    return Opened(_files(place.path), task.split.num_samples, encoded, measure, task.prompts_in_words())


def open_retrieval(place: Place) -> Opened:
    """Retrieval both ways, of a folder of CLIP_benchmark or of annotations (Karpathy's, ALBEF's)."""
    task = _task(place)
    if place.path.is_dir():
        files = _files(place.path)
    else:
        items = getattr(task.split, "items", [])
        files = {place.path.name: place.path} | {f"{number}": item.path for number, item in enumerate(items)}

    def measure(encode: Encode) -> Measured:
        numbers, plain = retrieval(EncodedSplit(encode, task, place.options, {}))
        both = [numbers[f"{direction}_R@1"] for direction in ("image_to_text", "text_to_image")]
        return numbers | {"mean_R@1": mean_of(*both)}, plain

    return Opened(files, task.split.num_samples, task.pairs_here(), measure)


def _task(place: Place) -> Task:
    return open_task(
        str(place.path), place.data, place.options, rank=place.rank, world_size=place.world_size, name=place.one.name,
        reading=place.own_reading,
    )  # fmt: skip


def _verbatim(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text("utf-8").rstrip().splitlines()]


def _files(path: Path) -> Files:
    beside = {name: path / name for name in _BESIDE if (path / name).is_file()}
    return beside | {f"test/{Path(shard).name}": Path(shard) for shard in shards_in(path / "test")}


def _groups(place: Place, task: Task) -> Tensor:
    """(n,) int64: every sample's group.

    Raises:
        UserError: a sample has no .npy, or no whole number at its place.
    """
    assert isinstance(task.split, EvaluationSplit)
    found = []
    for sample, array in enumerate(task.split.arrays()):
        values = array.reshape(-1)
        number = place.one.group or 0
        value = float(values[number]) if len(values) > number and values.dtype.kind in "iufb" else float("nan")
        if not (0 <= value < MOST and value.is_integer()):
            raise UserError(
                f"--data: {place.one.name}: sample {task.split.key(sample)}: expected a whole number at place {number} "
                f"of its .npy, which says its group, got {array!r}"
            )
        found.append(int(value))
    return torch.tensor(found)


@torch.no_grad()
def best_rivals(image: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """The class that scores highest beside an image's own, of all ranks' images: (N,) int64.

    Args:
        image: (n_r, D): this rank's.
        classes: (K, D).
        labels: (n_r,) int64.
    """
    found = [torch.empty(0, dtype=torch.int64, device=image.device)]
    for block, label in zip(torch.split(image, ROWS), torch.split(labels.to(image.device), ROWS), strict=True):
        found.append((block @ classes.T).scatter(1, label[:, None], -torch.inf).argmax(1))
    return gather_rows(torch.cat(found)).cpu()


def f1_macro(predicted: Tensor, labels: Tensor) -> float:
    """The mean over the classes that occur among the labels of F1; (N,) int64 both."""
    classes = int(max(predicted.max(), labels.max())) + 1
    right = torch.bincount(labels[predicted == labels], minlength=classes).double()
    sizes = torch.bincount(labels, minlength=classes).double()
    told = torch.bincount(predicted, minlength=classes).double()
    occurs = sizes > 0
    return float((2 * right[occurs] / (sizes + told)[occurs]).mean())


def group_shares(hits: Tensor, groups: Tensor) -> dict[int, float]:
    """The share of hits in every group that has samples; (N,) bool and int64."""
    known, place, sizes = groups.unique(return_inverse=True, return_counts=True)  # a group's number may be any
    found = torch.bincount(place, weights=hits.double())
    return {int(group): float(n / size) for group, n, size in zip(known, found, sizes, strict=True)}
