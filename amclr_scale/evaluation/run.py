"""Evaluation during and after training: every split of the recipe, on all ranks, every item once.

Results are flat: `emoji/val_style/image_to_text_R@1` is a share, and beside it `.../chance`, `.../stderr`, `.../low`
and `.../high` (the 95 % interval); ranks, sizes and counts stand alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amclr_scale.config.schema import Config
from amclr_scale.data.evaluation_split import EvaluationSplit, class_names
from amclr_scale.errors import UserError
from amclr_scale.evaluation.encode import Encode, encode_images, encode_texts
from amclr_scale.evaluation.numbers import Number, intervals
from amclr_scale.evaluation.retrieval import retrieval
from amclr_scale.evaluation.shares import gather_rows, share
from amclr_scale.evaluation.table import table
from amclr_scale.evaluation.zero_shot import accuracies, class_ranks, ensemble, prompts


class Evaluator:
    """`evaluator(model)` -> results, on every rank. Splits are opened, and mistakes in them found, when it is made.

    Args:
        config: the sections `data` and `evaluation` of a recipe.

    Raises:
        UserError: a split, a class field or a template is not usable.
    """

    def __init__(self, config: Config, *, rank: int, world_size: int):
        self.options = config.evaluation
        self.splits = [
            EvaluationSplit(name, config.data, rank=rank, world_size=world_size, classes=config.evaluation.classes)
            for name in config.evaluation.splits
        ]
        self.names: dict[str, list[str]] = {}
        self.labels: dict[str, Tensor] = {}
        for split in self.splits:
            if split.num_samples == 0:
                raise UserError(f"evaluation.splits: {split.name} is empty")
            if config.evaluation.classes is not None:
                names = class_names(split.name, config.data, config.evaluation.classes)
                prompts(names[:1], config.evaluation.templates)
                self.names[split.name], self.labels[split.name] = names, _numbered(split, names)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Measure. The model (or DeepSpeed's engine around it) is put into evaluation mode, and back."""
        training = model.training
        model.eval()
        try:
            return self.measure(model)
        finally:
            model.train(training)

    def measure(self, encode: Encode) -> dict[str, float]:
        """The same, for anything that is called like the model."""
        results: dict[str, float] = {}
        classifiers: dict[tuple[str, ...], Tensor] = {}  # splits mostly share their classes
        for split in self.splits:
            numbers, plain = self._retrieval_and_zero_shot(encode, split, classifiers)
            results |= flatten(split.name, numbers, plain, self.options.resamples)
        return results

    def _retrieval_and_zero_shot(
        self, encode: Encode, split: EvaluationSplit, classifiers: dict[tuple[str, ...], Tensor]
    ) -> tuple[dict[str, Number], dict[str, float]]:
        size = self.options.batch_size
        (image,) = encode_images(encode, split, size)
        texts, image_of_text, groups, keep = _gallery(split)
        text = encode_texts(encode, split.tokenizer, texts, size)
        mine, here = share(len(texts)), share(split.num_samples)
        ranks = retrieval(
            image[keep[here.start : here.stop].to(image.device)],
            text,
            image_of_text=image_of_text[mine.start : mine.stop].to(image.device),
            caption_groups=groups[mine.start : mine.stop].to(image.device),
        )
        numbers = ranks.numbers()
        if split.name in self.names:
            key = tuple(self.names[split.name])
            if key not in classifiers:
                classifiers[key] = self._classifier(encode, split, list(key))
            labels = self.labels[split.name]
            places = class_ranks(image, classifiers[key], labels[here.start : here.stop])
            numbers |= accuracies(places, labels, len(key))
        return numbers, ranks.plain()

    def _classifier(self, encode: Encode, split: EvaluationSplit, names: list[str]) -> Tensor:
        filled = prompts(names, self.options.templates)
        encoded = gather_rows(encode_texts(encode, split.tokenizer, filled, self.options.batch_size))
        return ensemble(encoded, len(self.options.templates))

    def table(self, results: Mapping[str, float]) -> str:
        """Results as text."""
        return table(results)


def _numbered(split: EvaluationSplit, names: list[str]) -> Tensor:
    """Every sample's class as a position in `names`.

    Raises:
        UserError: a label that is not there.
    """
    assert split.labels is not None
    places: dict[Any, int] = {name: place for place, name in enumerate(names)}
    found = [places.get(label, -1) if isinstance(label, str) else label for label in split.labels]
    for sample, place in enumerate(found):
        if not 0 <= place < len(names):
            raise UserError(
                f"evaluation.classes: {split.name}: sample {sample} has the class {split.labels[sample]!r}, which is "
                f"none of the {len(names)} class names"
            )
    return torch.tensor(found)


def _gallery(split: EvaluationSplit) -> tuple[list[str], Tensor, Tensor, Tensor]:
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
