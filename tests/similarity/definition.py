"""What the similarity engine computes, written down plainly: whole matrices and autograd, in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from amclr_scale.similarity import current

SLOWNESS = {"triton": 20}  # of a backend, which here is interpreted: it gets one example of so many

SMALLEST_CHUNK = {"triton": 7}  # each chunk costs an interpreted launch or three


def chunk_of(chunk: Any) -> Any:
    """As asked for, or as small as the backend in force has time for."""
    return chunk if chunk == "auto" else max(chunk, SMALLEST_CHUNK.get(current().backend, 1))


def for_all(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """A test on random examples: as many as the backend in force has time for."""

    def decorate(check: Callable[..., None]) -> Callable[[], None]:
        def test() -> None:
            few = max(1, examples // SLOWNESS.get(current().backend, 1))
            settings(max_examples=few, deadline=None, derandomize=True)(given(**strategies)(check))()

        test.__name__ = check.__name__
        return test

    return decorate


NAMES = ("image", "text", "image_temperature", "text_temperature")


@dataclass
class Inputs:
    """A global batch, and what the loss on top of the log-sums multiplies them by: any upstream gradient."""

    image: Tensor  # (B, D)
    text: Tensor  # (B, D)
    image_temperature: Tensor  # (B,) or (1,)
    text_temperature: Tensor
    extra_text: Tensor | None  # (M, D)
    extra_image: Tensor | None
    upstream: Tensor  # (3, B)

    def part(self, rows: slice) -> "Inputs":
        """Fresh leaves, of these rows."""
        t = [x[rows] if len(x) > 1 else x for x in (self.image_temperature, self.text_temperature)]
        leaves = [x.detach().clone().requires_grad_() for x in (self.image[rows], self.text[rows], *t)]
        return Inputs(*leaves, self.extra_text, self.extra_image, self.upstream[:, rows])

    def double(self) -> "Inputs":
        leaves = [getattr(self, name).detach().double().requires_grad_() for name in NAMES]
        extra = [None if x is None else x.double() for x in (self.extra_text, self.extra_image)]
        return Inputs(*leaves, *extra, self.upstream.double())

    @property
    def leaves(self) -> list[Tensor]:
        return [getattr(self, name) for name in NAMES]


def draw(
    B: int,
    D: int,
    seed: int,
    *,
    dtype: torch.dtype = torch.float64,
    lowest_temperature: float = 0.05,
    per_anchor: bool = True,
    of_all: bool = False,
    extra: int = 0,
    aligned: float = 0.5,
) -> Inputs:
    """A random batch whose pairs resemble one another by `aligned`; with `of_all`, both sides have one temperature."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    image = F.normalize(randn(B, D), dim=1)
    text = F.normalize(randn(B, D) + 3 * aligned * image, dim=1)
    n = B if per_anchor and not of_all else 1
    t = [lowest_temperature * (1 + 3 * torch.rand(n, generator=generator, dtype=torch.float64)) for _ in range(2)]
    keys = [F.normalize(randn(extra + i, D), dim=1).to(dtype) if extra else None for i in range(2)]
    return Inputs(
        image.to(dtype), text.to(dtype), t[0].to(dtype), t[0 if of_all else 1].to(dtype), *keys, randn(3, B).to(dtype)
    )


def side(
    anchors: Tensor, keys: Tensor, t: Tensor, extra: Tensor | None, *, exclude_positive: bool, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log_sum, positive and expected of one direction, by the formulas of `contrast`'s module docstring."""
    s = anchors @ torch.cat([keys, *([] if extra is None else [extra])]).T
    positive = s.diagonal()
    x = (s - (positive[:, None] if centred else 0)) / t.expand(len(s))[:, None]
    if exclude_positive:
        keep = ~torch.eye(*s.shape, dtype=torch.bool)
        x = x[keep].view(len(s), -1)
    log_sum = x.logsumexp(1)
    return log_sum, positive, ((x - log_sum[:, None]).exp() * x).sum(1)


def both_sides(inputs: Inputs, *, exclude_positive: bool, centred: bool, group: int) -> list[Tensor]:
    """log-sums of image and text anchors, positives, expectations of both: contrast inside groups of so many rows."""
    parts = []
    for first in range(0, len(inputs.image), group):
        rows = slice(first, first + group)
        image, text = inputs.image[rows], inputs.text[rows]
        t = [x[rows] if len(x) > 1 else x for x in (inputs.image_temperature, inputs.text_temperature)]
        options = {"exclude_positive": exclude_positive, "centred": centred}
        a = side(image, text, t[0], inputs.extra_text, **options)
        b = side(text, image, t[1], inputs.extra_image, **options)
        parts.append([a[0], b[0], a[1], a[2], b[2]])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def gradient_width(D: int, constants: int) -> int | None:
    """Of features of D columns, the last `constants` of which have no gradient; at least one has."""
    return max(1, D - constants) if constants else None


def without_constants(gradients: Sequence[Tensor], width: int | None) -> list[Tensor]:
    """Gradients with respect to the leaves of `Inputs`, 0 in the columns behind `width` of both features."""
    image, text, *temperatures = gradients
    if width is not None:
        image, text = (F.pad(x[:, :width], (0, x.shape[1] - width)) for x in (image, text))
    return [image, text, *temperatures]


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, with a want of zero compared absolutely."""
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm()) / (float(want.norm()) or 1.0)
