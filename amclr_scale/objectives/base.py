"""What an objective is: a module that turns `Embeddings` into a `Loss`, known by a name, with typed options.

An objective returns this rank's mean over its own rows and never asks how many ranks there are;
`distributed/collectives.py` states the rule that makes this the gradient of one global batch.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from amclr_scale.declarations import KINDS, Declarations, Inputs, with_layers
from amclr_scale.errors import UserError, did_you_mean
from amclr_scale.precision import HALF
from amclr_scale.similarity import world_size
from amclr_scale.types import Embeddings, Loss

Layout = Literal["auto", "replicated", "sharded"]
OUTSIDE = "amclr_scale_outside_"  # begins the module's name of an objective in a file outside the package


class Objective(Declarations, nn.Module):
    """Subclass as `class SogCLR(Objective, name="sogclr")`, with a nested frozen dataclass `Config`.

    The first line of the class's docstring is its description in `available()`. `Config` holds the options, each a
    plain annotated literal, and checks them together in `__post_init__`; a Config may inherit options from another.
    Options and `Declarations` are also read from source, without importing this package (docs/objectives.md).
    The constructor takes the Config, and `sample_state` where the objective keeps state per sample. A line
    `config: Config` after the options gives them their type.

    Attributes:
        config: the options.
        needs_unit_rows: embeddings must have unit length; False for VICReg, which needs them as they are.
        whole_set_options: options that differ where one batch is the whole data set, for they only make up for its
            not being that (whole_set.py compares the two).
        stores_features: it keeps rows of embeddings for later steps, which it reads until its backward is over.
        epoch: samples seen / samples in the data set, as of the last `set_epoch`.
    """

    registry: ClassVar[dict[str, type["Objective"]]] = {}
    name: ClassVar[str]
    Config: ClassVar[Callable[..., Any]]

    config: Any
    needs_unit_rows: bool = True
    whole_set_options: ClassVar[Mapping[str, Any]] = {}
    epoch: float = 0.0
    stores_features: bool = False
    queue: Any  # a `SharedQueue` where the option is set, which `create` gives it; None
    layers: Any  # likewise, `Layers`
    _lengths_seen: bool = False

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            if not cls.__module__.startswith(OUTSIDE):  # outside.py keeps those
                assert name not in Objective.registry, f"two objectives are called {name}"
                Objective.registry[name] = cls

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.queue = self.layers = None

    @staticmethod
    def model_parts(options: Any, width: int) -> nn.Module | None:
        """Modules that are trained with the towers: a network that gives temperatures, prototypes, a predictor.

        They live in the model as `parts`: saved, sharded by ZeRO and accounted like any other part of it. The module is
        called in the model's forward with what it has made for a micro-batch, and returns outputs under names of its
        own, which the objective finds in its embeddings, with gradient back into the parts, and through them:

            forward({"image": (m, D), "image_views": V of (m, D), "text": ..., "logit_scale": (1,), ...})
                -> {"image_temperature": (m,), "shared": {"prototypes": (M, D)}}

        Rows of samples stand at the top; what is one for all samples stands under "shared". A part gets rows in its own
        precision, bf16 say, and the objective gets float32. Images and texts may come in calls of their own, so a part
        gives what it can make of what is there. Where something is random or has statistics, it is per micro-batch. The
        learning-rate factor is `optimizer.lr_factors.heads`, or that which an attribute `learning_rate_factor` of the
        module names.

        A part whose arithmetic needs more digits than its weights have, in bf16, makes them float32 itself
        (`at_least_float32`), in modules of its own where it does so to a submodule's. A part that begins with data has
        an attribute `start_samples`, how many, and a method `start_from(images, texts)`, which gets their embeddings
        before unit length, (start_samples, D) each, once, before a new run's first step.

        Args:
            options: the Config.
            width: D, of the embeddings.
        """
        return None

    @cached_property
    def inputs(self) -> Inputs:
        """What this one reads."""
        return Inputs(with_layers(self.inputs_of(self.config), self.config))

    def __call__(self, embeddings: Embeddings) -> Loss:
        """`forward`, after checking that the embeddings hold what this objective reads.

        Raises:
            UserError: (a ValueError) a field is missing, rows do not match, or, at the first call, rows that should
                have unit length do not.
        """
        self._check(embeddings)
        self._check_lengths(embeddings)
        own = {name: getattr(embeddings, kind)[k] for name, kind, k in self.inputs.own_names()}
        read = dataclasses.replace(embeddings, **own) if own else embeddings
        loss: Loss = self._once(read) if self.layers is None else self.layers.around(self._once, read, self.epoch)
        return loss

    def _once(self, read: Embeddings) -> Loss:
        """`forward`, with the queue where there is one."""
        call = super().__call__
        loss: Loss = call(read) if self.queue is None else self.queue.around(call, read, self)
        return loss

    def masks(self, embeddings: Embeddings) -> Any:
        """What the shared options leave out of the sums over keys, and the keys that they add: a `Masking`."""
        config: Any = self.config
        masking = config.masks(embeddings)
        return masking if self.queue is None else self.queue.beside(masking)

    def set_epoch(self, epoch: float) -> None:
        """Say how far training is, in passes over the data set; the trainer does so before every step."""
        self.epoch = epoch

    def allocate(self, width: int) -> None:
        """Make state that waits for the first embeddings to know their width."""
        if self.queue is not None:
            self.queue.allocate(width)

    def rehearse(self, width: int, slots: int) -> None:
        """Be as in the midst of a run, where that matters for what a step costs; nothing is trained afterwards.

        Args:
            width: D.
            slots: to have in banks, all of them filled.
        """
        if self.queue is not None:
            self.queue.rehearse(width, slots)

    @property
    def learns(self) -> bool:
        """Whether this forward may change state: in training mode, and with gradients on."""
        return self.training and torch.is_grad_enabled()

    def _check_lengths(self, embeddings: Embeddings) -> None:
        if self._lengths_seen or not self.needs_unit_rows or embeddings.image.device.type == "meta":
            return
        self._lengths_seen = True  # once: on an accelerator the look is a wait
        for field in ("image", "text"):
            rows: Tensor = getattr(embeddings, field).detach()
            lengths = torch.linalg.vector_norm(rows, dim=1, dtype=at_least_float32(rows[:0]).dtype)
            wrong = ((lengths - 1).abs() > 0.02) & (lengths > 0) & lengths.isfinite()  # bfloat16 is right to 0.004
            if wrong.any():
                raise UserError(
                    f"embeddings.{field}: {self.name} expects rows of length 1, got one of length "
                    f"{lengths[wrong][0].item():.3g}; use torch.nn.functional.normalize(rows, dim=1)"
                )

    def _check(self, embeddings: Embeddings) -> None:
        image, text = embeddings.image, embeddings.text
        if image.ndim != 2 or image.shape != text.shape:
            got = f"{tuple(image.shape)} and {tuple(text.shape)}"
            raise UserError(f"embeddings.image, embeddings.text: expected two of one shape (b, D), got {got}")
        for field, rows in (("image", image), ("text", text)):
            if not rows.is_floating_point() or rows.device != image.device:
                raise UserError(
                    f"embeddings.{field}: expected floating-point numbers, on the device of the images "
                    f"({image.device}), got {rows.dtype} on {rows.device}"
                )
        if "ids" in self.inputs:
            for field, ids in (("ids", embeddings.ids), ("text_ids", embeddings.text_ids)):
                if ids is not None and (ids.shape != image.shape[:1] or ids.dtype != torch.int64):
                    got = f"{tuple(ids.shape)} {ids.dtype}"
                    raise UserError(f"embeddings.{field}: expected ({len(image)},) torch.int64, got {got}")
        flat = embeddings.flat()
        for name in self.inputs:
            self._check_input(name, [rows for key, rows in flat.items() if key.partition(".")[0] == name], image)

    def _check_input(self, name: str, found: list[Tensor], image: Tensor) -> None:
        """That so many tensors of a kind are there, a row per sample, and as wide as embeddings where they are some."""
        kind, wanted = KINDS[name], self.inputs.count(name)
        if len(found) < wanted:
            fix = f"; set {kind.key}" if kind.key else ""
            got = len(found) if kind.several else None
            raise UserError(
                f"embeddings.{name}: {self.name} needs {wanted if kind.several else 'them'}, got {got}{fix}"
            )
        for rows in found[:wanted]:
            if kind.shape == ("D",) and rows.shape != image.shape:
                which = "every view" if kind.several else "rows"
                raise UserError(f"embeddings.{name}: expected {which} to have the shape {tuple(image.shape)}")
            if kind.shape == ("n", "D") and (rows.dim() != 3 or rows.shape[2] != image.shape[1]):
                expected = f"tokens of the embeddings' width, ({len(image)}, n, {image.shape[1]})"
                raise UserError(f"embeddings.{name}: expected {expected}, got {tuple(rows.shape)}")
            if not kind.shared and len(rows) != len(image):
                raise UserError(f"embeddings.{name}: expected a row per sample, {len(image)}, got {len(rows)}")


class FullPrecision(nn.Module):
    """A module whose buffers stay at least float32 under `.half()` and `.bfloat16()`.

    Averages over many steps do not survive 8 bits of mantissa.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FullPrecision":
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new: Tensor = getattr(self, name)
            if new.dtype in HALF:
                setattr(self, name, old.to(new.device))
        return self


def global_batch_size(rows: Tensor) -> int:
    """B, where this rank has `rows` (b, ...)."""
    return len(rows) * world_size()


def learned_temperature(embeddings: Embeddings, fixed: float | None) -> Tensor | float:
    """The temperature: `fixed`, or 1 / logit_scale where the option is None."""
    if fixed is not None:
        return fixed
    if embeddings.logit_scale is None:
        raise UserError(
            "embeddings.logit_scale: expected the model's learned scale, got None; "
            "learn one, or give the objective a fixed temperature"
        )
    require(
        embeddings.logit_scale.numel() == 1,
        "embeddings.logit_scale",
        "one number, shape () or (1,)",
        tuple(embeddings.logit_scale.shape),
    )
    return 1 / at_least_float32(embeddings.logit_scale)


def beside(number: Tensor | float, rows: Tensor) -> Tensor:
    """A number as a tensor of the rows' type, where they are, without a copy from the host."""
    return number.to(rows) if isinstance(number, Tensor) else rows.new_full((), number)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.float() if x.dtype in HALF else x


class Metrics(typing.Mapping[str, float]):
    """Numbers to log, on the device until somebody reads one: a step that logs nothing does not wait for them."""

    def __init__(self, names: list[str], copied: Tensor | None, plain: dict[str, float]):
        self._names, self._copied, self._read = names, copied, plain

    def __getitem__(self, name: str) -> float:
        return self._all()[name]

    def __iter__(self) -> typing.Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return repr({name: self[name] for name in self})

    def _all(self) -> dict[str, float]:
        if self._copied is not None:  # the one wait
            tensors = [name for name in self._names if name not in self._read]
            self._read |= dict(zip(tensors, self._copied.tolist(), strict=True))
            self._copied = None
        return self._read


def numbers(**values: Tensor | float) -> Metrics:
    """Metrics for `Loss`: floats, copied from the device together and only when one is read."""
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    copied = None
    if tensors:
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32
        copied = torch.stack([t.to(dtype).reshape(()) for t in tensors.values()])  # as they are now
    return Metrics(list(values), copied, {n: float(v) for n, v in values.items() if not isinstance(v, Tensor)})


def require(condition: bool, key: str, expected: str, got: object, *, fix: str = "") -> None:
    """Raise `UserError` in the house's words unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}: expected {expected}, got {got!r}" + (f"; {fix}" if fix else ""))


def refuse_unread(options: Any, keys: typing.Iterable[str], reader: str) -> None:
    """Raise `UserError` if any of these options is not at its default, which nothing reads.

    Args:
        reader: the only setting that does, such as "gamma_schedule cosine".
    """
    defaults = {option.name: option.default for option in dataclasses.fields(options)}
    for key in keys:
        got = getattr(options, key)
        wanted = "null" if defaults[key] is None else defaults[key]
        require(got == defaults[key], key, f"{wanted}, the default, for only {reader} reads it", got, fix="remove it")


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'sogclr'?`, or the known words where none is near."""
    known = sorted(known)
    return did_you_mean(word, known) or f"; known: {', '.join(known)}"
