"""Evaluation during and after training: every split of the recipe, on all ranks, every item once.

Results are flat: `emoji/val_style/image_to_text_R@1` is a share, and beside it stand `.../chance`, `.../stderr`,
`.../low` and `.../high` (the 95 % interval); ranks, sizes and geometry stand alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from PIL import Image
from torch import nn

from amclr_scale.config.schema import Config
from amclr_scale.data.names import probe_name, split_names
from amclr_scale.data.reading import Reading
from amclr_scale.encoders.rank_buffers import one_set_of_buffers
from amclr_scale.errors import UserError, did_you_mean
from amclr_scale.evaluation.encode import Encode
from amclr_scale.evaluation.evaluators import ALWAYS, EVALUATORS, Classifiers, EncodedSplit
from amclr_scale.evaluation.frozen_features.measure import measure_probe, probe_tasks
from amclr_scale.evaluation.numbers import Number, intervals
from amclr_scale.evaluation.shares import share
from amclr_scale.evaluation.sheet import text_to_image_sheet
from amclr_scale.evaluation.splits import open_task
from amclr_scale.evaluation.table import table

MOMENTUM = "momentum/"  # before the names of what was measured of a moving average of the weights


class Evaluator:
    """`evaluator(model)` -> results, on every rank. Splits are opened, and mistakes in them found, when it is made.

    Args:
        config: the sections `data` and `evaluation` of a recipe. All ranks of the process group make one.
        rank, world_size: those of the process group.
        reading: how the model reads pictures and captions, where it is not as `config` says.
        begun: a run that goes on makes it: shards that lie beside a split since are reported, and not measured.

    Attributes:
        tasks: the splits, opened.
        numbers: what the last call measured, for comparisons: by split, by name.

    Raises:
        UserError: a split, a class field or a template is not usable.
    """

    def __init__(
        self, config: Config, *, rank: int = 0, world_size: int = 1, reading: Reading | None = None, begun: bool = False
    ):
        self.options = options = config.evaluation
        for name in options.evaluators:
            if name not in EVALUATORS:
                expected = f"expected names among {', '.join(EVALUATORS)}"
                raise UserError(f"evaluation.evaluators: {expected}, got {name!r}{did_you_mean(name, EVALUATORS)}")
        self.evaluators = list(dict.fromkeys([*ALWAYS, *options.evaluators]))
        data = config.data.model_copy(update={"caption": options.caption or config.data.caption})
        opened = partial(
            open_task, data=data, options=options, rank=rank, world_size=world_size, reading=reading, begun=begun
        )
        self.tasks = [opened(path, name=name) for name, path in split_names(options).items()]
        self.probes = [(one, *probe_tasks(one, opened)) for one in options.probes]
        self.numbers: dict[str, dict[str, Number]] = {}

    def __call__(self, model: nn.Module, prefix: str = "") -> dict[str, float]:
        """Measure. The model (or DeepSpeed's engine around it) is put into evaluation mode, and back.

        Buffers that ranks have apart (BatchNorm's statistics) are averaged for as long, as in the weights of a run.

        Args:
            prefix: of all names, where a second model is measured: what is known of the first one stays.
        """
        with as_measured(model):
            return self.measure(model, prefix)

    def sheets(self, model: nn.Module, rows: int) -> dict[str, Image.Image]:
        """Of every split with retrieval, by its name: captions with the images found for them (evaluation/sheet.py).

        Args:
            model: as in a call.
            rows: captions found, and as many missed.
        """
        with as_measured(model):
            return {
                task.name: text_to_image_sheet(model, task, self.options.batch_size, rows)
                for task in self.tasks
                if task.retrieval
            }

    def measure(self, encode: Encode, prefix: str = "") -> dict[str, float]:
        """The same, for anything that is called like the model."""
        results: dict[str, float] = {}
        self.numbers = dict(self.numbers) if prefix else {}
        classifiers: Classifiers = {}  # splits mostly share their classes
        for task in self.tasks:
            seen = EncodedSplit(encode, task, self.options, classifiers)
            measured = [EVALUATORS[name](seen) for name in self.evaluators]
            numbers = {name: one for found, _ in measured for name, one in found.items()}
            plain = {name: one for _, found in measured for name, one in found.items()}
            results |= self._flat(prefix + task.name, numbers, plain)
        for options, train, test in self.probes:
            numbers, plain = measure_probe(encode, options, train, test, self.options.batch_size)
            results |= self._flat(prefix + probe_name(options, self.options), numbers, plain)
        return results

    def items(self) -> int:
        """Images and texts that this rank encodes in one measurement."""
        total = 0
        classifiers: set[tuple[str, ...]] = set()
        for task in self.tasks:
            once_more = task.retrieval and "token_retrieval" in self.evaluators
            total += task.pairs_here() * (1 + once_more)
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


@contextmanager
def as_measured(model: nn.Module) -> Iterator[None]:
    """A model, or the engine around it, in evaluation mode, with the same buffers on all ranks."""
    training = model.training
    model.eval()
    try:
        with one_set_of_buffers(getattr(model, "module", model)):
            yield
    finally:
        model.train(training)


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
