"""In which precision the operands of matrix products are, and how features become such operands.

m  rows of a matrix of features    D  width    P  width of what products read

    form     similarities                                    gradients: W times features
    fp64     float64                                         float64
    fp32     float32 (IEEE: no TF32)                         float32
    bf16     bfloat16                                        both bfloat16
    fp16     float16, for features of this type              both bfloat16: weights may be smaller than float16's least
    split    x = high + low, both bfloat16: low high + high low + high high, 16 bits of x's 24

Products of 16-bit operands are exact, and summed in float32. Tensor cores cut each partial sum off instead of rounding
it, which costs in proportion to the sum: so the small products come first. Similarities, exponents and sums are never
narrower than float32, whatever the form. Where a machine has no product of 16-bit matrices with a float32 result
(CPUs), operands are rounded as the form says and then multiplied as float32: the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.similarity.settings import Settings

Form = Literal["fp64", "fp32", "bf16", "fp16", "split"]
NARROW: tuple[Form, ...] = ("bf16", "fp16", "split")
WIDE_PRODUCTS = hasattr(torch.ops.aten.addmm, "dtype_out")  # 16-bit matrices, float32 product: torch 2.8 and later
AT_ONCE = 2**26  # bytes of features that are converted at once, and kept: beyond, piece by piece


def form_of(settings: Settings, features: torch.dtype, *, fast_narrow: bool) -> Form:
    """The form that `settings.precision` means for such features.

    Args:
        features: their type.
        fast_narrow: whether 16-bit products are faster here than float32's; if not, `auto` has no reason to round.
    """
    if features == torch.float64:
        return "fp64"
    if settings.precision != "auto":
        return settings.precision
    if not fast_narrow:
        return "fp32"
    if features == torch.float16:
        return "fp16"
    if features == torch.bfloat16:
        return "bf16"
    return "fp32" if settings.run_precision in ("fp32", "tf32") else "split"


@dataclass(frozen=True)
class Operand:
    """Rows of features, ready to be multiplied."""

    product: Tensor  # (m, P): product of left and right operands is the similarities
    parts: tuple[Tensor, ...]  # (m, D) each: their sum is what gradients are made of

    def __getitem__(self, rows: slice) -> "Operand":
        return Operand(self.product[rows], tuple(part[rows] for part in self.parts))


def operand(x: Tensor, form: Form, *, left: bool, multiple: int = 1, widen: torch.dtype | None = None) -> Operand:
    """Features (m, D) as one side of products.

    Args:
        left: anchors; the other side are keys. `split` has three products along the width, small ones first.
        multiple: P is a multiple of this, filled with zeros.
        widen: multiply in this type what was rounded as `form` says; None: in the form's own.
    """
    D = x.shape[1]
    if form == "split":
        high = x.bfloat16()
        low = (x.to(torch.float32) - high.to(torch.float32)).bfloat16()
        high, low = _padded(high, multiple), _padded(low, multiple)
        product = torch.cat((low, high, high) if left else (high, low, high), dim=1)
        parts: tuple[Tensor, ...] = (high[:, :D],) if x.dtype == torch.bfloat16 else (high[:, :D], low[:, :D])
    elif form == "fp16":
        product, parts = _padded(x.half(), multiple), (x.bfloat16(),)
    else:
        product = _padded(x.to({"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[form]), multiple)
        parts = (product[:, :D],)
    if widen is not None:
        product, parts = product.to(widen), tuple(part.to(widen) for part in parts)
    return Operand(product, parts)


def _padded(x: Tensor, multiple: int) -> Tensor:
    missing = -x.shape[1] % multiple
    return (F.pad(x, (0, missing)) if missing else x).contiguous()


class Operands:
    """A matrix of features as one side of products: converted once if that takes little memory, else when asked for."""

    def __init__(self, x: Tensor, form: Form, *, left: bool, multiple: int, widen: torch.dtype | None = None):
        self.x, self.form, self.left, self.multiple, self.widen = x, form, left, multiple, widen
        width = (3 if form == "split" else 1) * (x.shape[1] + -x.shape[1] % multiple)
        row_bytes = (2 if form in NARROW else 4) * width
        self.step = max(1, AT_ONCE // row_bytes)  # rows to ask for
        free = (form, x.dtype) in FREE and x.shape[1] % multiple == 0 and x.is_contiguous()
        self.whole = self._convert(x) if free or len(x) <= self.step else None
        if self.whole is not None:
            self.step = max(1, len(x))

    def __getitem__(self, rows: slice) -> Operand:
        return self._convert(self.x[rows]) if self.whole is None else self.whole[rows]

    def _convert(self, x: Tensor) -> Operand:
        return operand(x, self.form, left=self.left, multiple=self.multiple, widen=self.widen)


FREE = {("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)}  # what converts to itself


def weight_parts(weights: Tensor, form: Form, widen: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Weights in the precision in which `form` multiplies them."""
    if form not in NARROW:
        return (weights,)
    high = weights.bfloat16()
    if form != "split":
        return (high,) if widen is None else (high.to(widen),)
    low = (weights - high.to(weights.dtype)).bfloat16()
    return (high, low) if widen is None else (high.to(widen), low.to(widen))


def add_product(out: Tensor, weights: Sequence[Tensor], features: Sequence[Tensor]) -> None:
    """Out (m, d) += weights (m, n) times features (n, D), each given as one part or two; without low times low.

    Of features that are wider than `out`, only the first d columns.
    """
    features = [f[:, : out.shape[1]] for f in features]
    for i, w in enumerate(weights):
        for f in features[: len(features) - i] if len(features) > 1 else features:
            if w.dtype == out.dtype:
                out.addmm_(w, f)
            elif out.is_cuda:
                torch.ops.aten.addmm.dtype_out(out, w, f, out.dtype, out=out)
            else:
                out.addmm_(w.to(out.dtype), f.to(out.dtype))
