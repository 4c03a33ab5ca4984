"""Evaluation during and after training: every split of the recipe, on all ranks, every item once.

Results are flat: `emoji/val_style/image_to_text_R@1` is a share, and beside it stand `.../chance`, `.../stderr`,
`.../low` and `.../high` (the 95 % interval); ranks, sizes and geometry stand alone.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.config.schema import Config, Probe
from amclr_scale.data.names import probe_name, split_names
from amclr_scale.encoders.rank_buffers import one_set_of_buffers
from amclr_scale.errors import UserError
from amclr_scale.evaluation import neighbours, probe
from amclr_scale.evaluation.composition import composition
from amclr_scale.evaluation.encode import Encode, encode_images, encode_texts
from amclr_scale.evaluation.geometry import geometry
from amclr_scale.evaluation.image_files import ImageFiles
from amclr_scale.evaluation.numbers import Number, intervals
from amclr_scale.evaluation.retrieval import retrieval
from amclr_scale.evaluation.shares import gather_rows, share
from amclr_scale.evaluation.splits import Split, Task, open_task
from amclr_scale.evaluation.table import table
from amclr_scale.evaluation.zero_shot import accuracies, class_ranks, ensemble, prompts

FEATURES = {"embedding": "image", "tower": "image_features"}


class Evaluator:
    """`evaluator(model)` -> results, on every rank. Splits are opened, and mistakes in them found, when it is made.

    Args:
        config: the sections `data` and `evaluation` of a recipe. All ranks of the process group make one.
        rank, world_size: those of the process group.

    Attributes:
        tasks: the splits, opened.
        numbers: what the last call measured, for comparisons: by split, by name.

    Raises:
        UserError: a split, a class field or a template is not usable.
    """

    def __init__(self, config: Config, *, rank: int = 0, world_size: int = 1):
        self.options = options = config.evaluation
        data = config.data.model_copy(update={"caption": options.caption or config.data.caption})
        opened = partial(open_task, data=data, options=options, rank=rank, world_size=world_size)
        self.tasks = [opened(path, name=name) for name, path in split_names(options).items()]
        self.probes = [(one, *_probe_tasks(one, opened)) for one in options.probes]
        self.numbers: dict[str, dict[str, Number]] = {}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Measure. The model (or DeepSpeed's engine around it) is put into evaluation mode, and back.

        Buffers that ranks have apart (BatchNorm's statistics) are averaged for as long, as in the weights of a run.
        """
        training = model.training
        model.eval()
        try:
            with one_set_of_buffers(getattr(model, "module", model)):
                return self.measure(model)
        finally:
            model.train(training)

    def measure(self, encode: Encode) -> dict[str, float]:
        """The same, for anything that is called like the model."""
        results: dict[str, float] = {}
        self.numbers = {}
        classifiers: dict[tuple[str, ...], Tensor] = {}  # splits mostly share their classes
        for task in self.tasks:
            numbers, plain = self._task(encode, task, classifiers)
            results |= self._flat(task.name, numbers, plain)
        for options, train, test in self.probes:
            numbers, plain = _measure_probe(encode, options, train, test, self.options.batch_size)
            results |= self._flat(probe_name(options, self.options), numbers, plain)
        return results

    def items(self) -> int:
        """Images and texts that this rank encodes in one measurement."""
        total = 0
        classifiers: set[tuple[str, ...]] = set()
        for task in self.tasks:
            total += task.pairs_here()
            if task.class_names and (key := (*task.class_names, *task.templates)) not in classifiers:
                classifiers.add(key)
                total += len(share(len(task.class_names) * len(task.templates)))
        return total + sum(len(share(task.split.num_samples)) for _, *pair in self.probes for task in pair)

    def prompts(self) -> list[str]:
        """Of every split with zero-shot classification, its first prompts, in words."""
        return [words for task in self.tasks if (words := task.prompts_in_words())]

    def table(self, results: Mapping[str, float]) -> str:
        """Results as text, and the first prompts behind them."""
        return "\n\n".join([table(results), *self.prompts()])

    def _flat(self, name: str, numbers: dict[str, Number], plain: Mapping[str, float]) -> dict[str, float]:
        self.numbers[name] = numbers
        return flatten(name, numbers, plain, self.options.resamples)

    def _task(
        self, encode: Encode, task: Task, classifiers: dict[tuple[str, ...], Tensor]
    ) -> tuple[dict[str, Number], dict[str, float]]:
        split, size = task.split, self.options.batch_size
        (image,) = encode_images(encode, split, size)
        here = share(split.num_samples)
        numbers: dict[str, Number] = {}
        plain: dict[str, float] = {}
        if task.retrieval:
            texts, owners, groups, keep = gallery(split)
            mine = share(len(texts))
            text = encode_texts(encode, split.tokenizer, texts, size)
            ranks = retrieval(
                image[keep[here.start : here.stop].to(image.device)],
                text,
                image_of_text=owners[mine.start : mine.stop].to(image.device),
                caption_groups=groups[mine.start : mine.stop].to(image.device),
            )
            numbers, plain = ranks.numbers(), ranks.plain()
            if self.options.geometry or isinstance(split, ImageFiles):
                first = _first_captions(split, text)[here.start : here.stop]
                if self.options.geometry:
                    labels = task.labels[here.start : here.stop] if task.class_names else None
                    plain |= geometry(image, first, labels)
                numbers |= _composition(encode, split, image, first, size)
        if task.class_names:
            key = (*task.class_names, *task.templates)
            if key not in classifiers:
                filled = prompts(task.class_names, task.templates)
                encoded = gather_rows(encode_texts(encode, split.tokenizer, filled, size))
                classifiers[key] = ensemble(encoded, len(task.templates))
            places = class_ranks(image, classifiers[key], task.labels[here.start : here.stop])
            numbers |= accuracies(places, task.labels, len(task.class_names))
        return numbers, plain


def gallery(split: Split) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """All texts, the image of each, which of them are the same caption, and which samples stand for an image.

    Samples that show the same image count as one, with the captions of all of them; the first one's pixels are used.
    """
    _, numbers = torch.unique(split.image_ids, return_inverse=True)
    first = torch.full((int(numbers.max()) + 1,), split.num_samples)
    first = first.scatter_reduce(0, numbers, torch.arange(split.num_samples), "amin")
    keep = torch.zeros(split.num_samples, dtype=torch.bool)
    keep[first] = True
    place = keep.cumsum(0) - 1  # of an image among those kept
    texts = [caption for captions in split.caption_lists for caption in captions]
    owners = [int(place[first[numbers[s]]]) for s, captions in enumerate(split.caption_lists) for _ in captions]
    seen: dict[str, int] = {}
    groups = [seen.setdefault(caption, len(seen)) for caption in texts]
    return texts, torch.tensor(owners), torch.tensor(groups), keep


def _first_captions(split: Split, text: Tensor) -> Tensor:
    """The first caption of every sample, from a rank's share of all captions: (n, D) on every rank."""
    starts = [0, *accumulate(len(captions) for captions in split.caption_lists)][:-1]
    return gather_rows(text)[torch.tensor(starts, device=text.device)]


def _composition(encode: Encode, split: Split, image: Tensor, first: Tensor, size: int) -> dict[str, Number]:
    if not isinstance(split, ImageFiles) or not any(item.negatives for item in split.items):
        return {}
    listed = [
        (row, kind, text) for row, item in enumerate(split.items) for kind, ts in item.negatives.items() for text in ts
    ]
    kinds = sorted({kind for _, kind, _ in listed})
    mine = share(len(listed))
    wrong = encode_texts(encode, split.tokenizer, [text for _, _, text in listed], size)
    rows = torch.tensor(
        [(row, kinds.index(kind)) for row, kind, _ in listed[mine.start : mine.stop]], dtype=torch.int64
    )
    rows = rows.view(-1, 2).to(image.device)
    return composition(image, first, wrong, sample_of_wrong=rows[:, 0], kind_of_wrong=rows[:, 1], kinds=kinds)


def _probe_tasks(one: Probe, opened: Callable[..., Task]) -> tuple[Task, Task]:
    """The two labelled splits of a probe, which must agree about the classes."""
    tasks = []
    for key, name in (("train", one.train), ("test", one.test)):
        task = opened(name, classes=one.classes)
        if not task.class_names:
            raise UserError(
                f"evaluation.probes.{key}: expected labelled images, got {name}, which has no classes; of shards "
                "evaluation.probes.classes says where they are"
            )
        tasks.append(task)
    if tasks[0].class_names != tasks[1].class_names:
        raise UserError(
            f"evaluation.probes.test: {one.test} has other classes ({len(tasks[1].class_names)}) than "
            f"{one.train} ({len(tasks[0].class_names)})"
        )
    return tasks[0], tasks[1]


def _measure_probe(
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
    order = torch.randperm(train.split.num_samples, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(train.split.num_samples, dtype=torch.bool)
    chosen[order[: max(1, round(options.validation * len(order)))]] = True
    validation = chosen[rows.start : rows.stop].to(device)
    numbers: dict[str, Number] = {}
    plain: dict[str, float] = {}
    for name, learned, measured in zip(options.features, *encoded, strict=True):
        x, z = F.normalize(learned.float(), dim=-1), F.normalize(measured.float(), dim=-1)
        suffix = "" if name == "embedding" else "_tower"
        if "linear" in options.methods:
            classifier, _ = probe.sweep(x, y, validation, K, options.l2)
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


def _accuracy(scores: Tensor, target: Tensor, test: Task, name: str) -> dict[str, Number]:
    """Places by score; ties, and scores that are no numbers, count against the classifier."""
    places = gather_rows((~(scores < scores.gather(1, target[:, None]))).sum(1)).cpu()
    return accuracies(places, test.labels, len(test.class_names), name=name)


def flatten(split: str, numbers: Mapping[str, Number], plain: Mapping[str, float], resamples: int) -> dict[str, float]:
    """One flat dictionary of floats: value, chance, standard error and interval of every number."""
    results: dict[str, float] = {}
    bounds = intervals(numbers, resamples=resamples) if resamples else {}
    for name, one in numbers.items():
        key = f"{split}/{name}"
        results[key] = one.value
        if one.chance is not None:
            results[f"{key}/chance"] = one.chance
        results[f"{key}/stderr"] = one.standard_error
        if name in bounds:
            results[f"{key}/low"], results[f"{key}/high"] = bounds[name]
    return results | {f"{split}/{name}": float(value) for name, value in plain.items()}
