"""Blocks of similarities in Triton kernels: tiles are made, used and forgotten in registers.

b  anchors    n  keys of a block    D  width

Operands of 16 bits (forms bf16, fp16 and split of `precision.py`):

    statistics    one launch per direction over all keys, no memory but numbers per anchor
    gradients     a kernel writes a span of weights W, two library products with float32 sums add W keys and W^T anchors

Operands of float32 and float64 have no fast product inside a kernel that is not TF32. There a library product makes a
span of similarities, which one kernel per direction, or the weights' kernel, reads once.

`Settings.cache_bytes` is used by the second kind only: reading a span back takes as long as making it from 16 bits.
With TRITON_INTERPRET=1, set before the first import of Triton, all of it runs on CPU tensors, slowly: for tests.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from amclr_scale.similarity import triton_kernels as kernels
from amclr_scale.similarity.blocks import Mask, Sigmoid, Statistics, TileCache, Weights
from amclr_scale.similarity.precision import NARROW, Form, Operand, Operands, add_product, weight_parts
from amclr_scale.similarity.settings import Settings
from amclr_scale.similarity.triton_sigmoid import sigmoid_kernel
from amclr_scale.similarity.triton_tiles import WIDTH_MULTIPLE, Kernel, Tile, span_shape, tile_of

MERGED = 256  # anchors of one program of the merge kernel
COMMON = 2048  # numbers at a time of the kernel that looks for a common exponential
MOST_RUNS = 64
FAR = 2**31  # entries from where offsets need 64 bits


class TritonBlocks:
    """`Blocks` with Triton kernels."""

    def __init__(self, settings: Settings, dtype: torch.dtype, form: Form, device: torch.device):
        self.dtype, self.form, self.device = dtype, form, device
        self.span = span_shape(settings, form)
        self.given = form not in NARROW
        # Interpreted, bfloat16 matrices are multiplied as integers and rounded towards zero: leave both to PyTorch.
        self.widen = torch.float32 if form in NARROW and device.type == "cpu" else None
        self.multiple = 1 if self.given else WIDTH_MULTIPLE if device.type == "cuda" else 16
        self.buffers: list[Tensor] = []

    def accumulate(
        self,
        anchors: Tensor,
        keys: Tensor,
        rows: Statistics,
        columns: Statistics | None = None,
        *,
        diagonal: int | None = None,
        positive: Tensor | None = None,
        exclude_positive: bool = False,
        mask: Mask | None = None,
        cache: TileCache | None = None,
    ) -> None:
        left, right = self._operands(anchors, keys)
        step = self.span if self.given else (left.step, right.step)
        with _on(self.device):
            for r, c, shifted in _spans(len(anchors), len(keys), step, diagonal):
                a, k = left[r], right[c]
                if self.given:
                    buffer = self._buffer(0, len(a.product), len(k.product))
                    s = cache.room(buffer) if cache else buffer
                    torch.mm(a.product, k.product.T, out=s)
                    of_rows: tuple[Tensor, Tensor | None] = (s, None)
                    of_columns: tuple[Tensor, Tensor | None] = (s.T, None)
                else:
                    of_rows, of_columns = (a.product, k.product), (k.product, a.product)
                positives = None if positive is None else positive[r]
                here = mask and mask[r, c]
                self._statistics(*of_rows, rows[r], shifted, positives, here, exclude=exclude_positive)
                if columns:
                    turned = None if shifted is None else -shifted
                    here = here and here.turned()
                    self._statistics(*of_columns, columns[c], turned, None, here, exclude=exclude_positive)

    def differentiate(
        self,
        anchors: Tensor,
        keys: Tensor,
        rows: Weights | None,
        columns: Weights | None = None,
        *,
        d_anchors: Tensor | None = None,
        d_keys: Tensor | None = None,
        diagonal: int | None = None,
        positive_weight: Tensor | None = None,
        mask: Mask | None = None,
        cache: TileCache | None = None,
    ) -> None:
        left, right = self._operands(anchors, keys)
        with _on(self.device):
            one = None if mask and mask.limited else self._common(rows, columns)
            for r, c, shifted in _spans(len(anchors), len(keys), self.span, diagonal):
                a, k = left[r], right[c]
                weights = self._weights(
                    a, k, rows and rows[r], columns and columns[c], one,
                    None if shifted is None or positive_weight is None else (shifted, positive_weight[r]),
                    mask and mask[r, c], cache,
                )  # fmt: skip
                _add_gradients(self._parts(weights), a, k, d_anchors, d_keys, r, c)

    def sigmoid(
        self,
        anchors: Tensor,
        keys: Tensor,
        numbers: Sigmoid,
        *,
        d_anchors: Tensor | None = None,
        d_keys: Tensor | None = None,
        diagonal: int | None = None,
    ) -> None:
        left, right = self._operands(anchors, keys)
        store = d_anchors is not None or d_keys is not None
        with _on(self.device):
            for r, c, shifted in _spans(len(anchors), len(keys), self.span, diagonal):
                a, k = left[r], right[c]
                b, n = len(a.product), len(k.product)
                A, K, shape = self._source("sigmoid", a, k, None)
                out = self._outputs(b, n)
                programs = triton.cdiv(b, shape.BM) * triton.cdiv(n, shape.BN)
                sums = torch.empty(3, programs, dtype=self.dtype, device=self.device)
                sigmoid_kernel[(programs,)](
                    A, K, out[0], out[-1], numbers.scale, numbers.bias, sums, b, n, *self._strides(A, K),
                    out[0].stride(0), shifted or 0, DIAGONAL=shifted is not None, STORE=store,
                    LOW=self.form == "split", DOUBLE=self.dtype == torch.float64, **self._compiled(A, K, b, n, shape),
                )  # fmt: skip
                for total, found in zip(
                    (numbers.loss, numbers.d_scale, numbers.d_bias), sums.double().sum(1), strict=True
                ):
                    total.add_(found)
                if store:
                    _add_gradients(self._parts(out), a, k, d_anchors, d_keys, r, c)

    def _operands(self, anchors: Tensor, keys: Tensor) -> tuple[Operands, Operands]:
        options: dict[str, Any] = {"multiple": self.multiple, "widen": self.widen}
        return Operands(anchors, self.form, left=True, **options), Operands(keys, self.form, left=False, **options)

    def _statistics(
        self,
        A: Tensor,  # (b, P), or similarities (b, n)
        K: Tensor | None,  # (n, P)
        side: Statistics,  # (b,)
        diagonal: int | None,
        positive: Tensor | None,
        mask: Mask | None = None,
        *,
        exclude: bool,
    ) -> None:
        b, n = len(A), A.shape[1] if K is None else len(K)
        kernel: Kernel = "accumulate" if A.stride(1) == 1 else "accumulate_columns"
        shape = tile_of(kernel, self.form, A.shape[1], self.device, masked=mask is not None)
        run, runs = runs_of(b, n, shape, _processors(self.device))
        sums = [side.shift, side.mass, side.moment]
        parts = torch.empty(3, runs, b, dtype=self.dtype, device=self.device) if runs > 1 else None
        into = sums if parts is None else parts.unbind()
        kernels.accumulate_kernel[(triton.cdiv(b, shape.BM), runs)](
            A, A if K is None else K, side.rate, *into, side.rate if positive is None else positive,
            *_pointers(mask, side.rate)[:5], b, n, run, *self._strides(A, K), diagonal or 0,
            DIAGONAL=diagonal is not None and (exclude or positive is not None or mask is not None),
            STORE_POSITIVE=positive is not None, EXCLUDE=exclude, CONTINUE=parts is None, **_masked(mask),
            **self._compiled(A, K, b, n, shape, grouped=False),
        )  # fmt: skip
        if parts is not None:
            kernels.merge_kernel[(triton.cdiv(b, MERGED),)](side.rate, parts, *sums, b, runs, BM=MERGED)

    def _weights(
        self,
        a: Operand,
        k: Operand,
        rows: Weights | None,
        columns: Weights | None,
        one: Tensor | None,
        positive: tuple[int, Tensor] | None,  # where the diagonal begins, and its weights (b,)
        mask: Mask | None = None,
        cache: TileCache | None = None,
    ) -> list[Tensor]:
        b, n = len(a.product), len(k.product)
        A, K, shape = self._source("weights", a, k, cache, masked=mask is not None)
        out = self._outputs(b, n)
        unused = out[0]
        numbers = [x for side in (rows, columns) for x in _numbers(side, unused)]
        diagonal, of_positives = positive or (0, unused)
        kernels.weights_kernel[(triton.cdiv(b, shape.BM) * triton.cdiv(n, shape.BN),)](
            A, K, out[0], out[-1], *numbers, of_positives, unused if one is None else one,
            *_pointers(mask, unused), b, n, *self._strides(A, K), out[0].stride(0), diagonal, ROWS=rows is not None,
            COLUMNS=columns is not None, DIAGONAL=positive is not None, COMMON=one is not None,
            LOW=self.form == "split", **_masked(mask),
            **self._compiled(A, K, b, n, shape),
        )  # fmt: skip
        return out

    def _common(self, rows: Weights | None, columns: Weights | None) -> Tensor | None:
        """On the device: whether one exponential is exact enough. Asked where weights are rounded to 16 bits."""
        if rows is None or columns is None or self.form not in ("bf16", "fp16"):
            return None
        out = torch.empty(3, dtype=torch.float32, device=self.device)
        kernels.common_kernel[(1,)](
            rows.rate, rows.shift, columns.rate, columns.shift, out, len(rows.rate), len(columns.rate), BLOCK=COMMON,
            num_warps=8,
        )  # fmt: skip
        return out

    def _source(
        self, kernel: Kernel, a: Operand, k: Operand, cache: TileCache | None, *, masked: bool = False
    ) -> tuple[Tensor, Tensor | None, Tile]:
        """What a kernel over a span of weights reads: operands, or similarities."""
        shape = tile_of(kernel, self.form, a.product.shape[1], self.device, masked=masked)
        if not self.given:
            return a.product, k.product, shape
        s = cache.take() if cache else None
        if s is None:
            s = torch.mm(a.product, k.product.T, out=self._buffer(0, len(a.product), len(k.product)))
        return s, None, shape

    def _outputs(self, b: int, n: int) -> list[Tensor]:
        """Memory for a span of weights, in as many parts as `form` has."""
        if self.given:
            return [self._buffer(1, b, n)]
        return [self._buffer(i, b, n) for i in range(2 if self.form == "split" else 1)]

    def _parts(self, weights: list[Tensor]) -> Sequence[Tensor]:
        return weights if self.widen is None else weight_parts(weights[0], self.form)

    def _buffer(self, number: int, b: int, n: int) -> Tensor:
        while len(self.buffers) <= number:
            self.buffers.append(torch.empty(0))
        if self.buffers[number].numel() < b * n:
            dtype = self.dtype if self.given else self.widen or torch.bfloat16
            self.buffers[number] = torch.empty(b * n, dtype=dtype, device=self.device)
        return self.buffers[number][: b * n].view(b, n)

    def _strides(self, A: Tensor, K: Tensor | None) -> tuple[int, int]:
        return (A.stride(0), A.stride(1)) if K is None else (A.stride(0), K.stride(0))

    def _compiled(
        self, A: Tensor, K: Tensor | None, b: int, n: int, shape: Tile, *, grouped: bool = True
    ) -> dict[str, Any]:
        """What the kernels that make similarities are compiled for."""
        furthest = max(b * n, *(x.shape[0] * x.stride(0) + x.shape[1] * x.stride(1) for x in (A, K) if x is not None))
        group = {"GROUP": shape.group} if grouped else {}
        return group | {
            "WIDTH": A.shape[1] if not self.given else shape.BK, "GIVEN": self.given, "BM": shape.BM, "BN": shape.BN,
            "BK": shape.BK, "STAGES": shape.stages, "PRECISION": "ieee",
            "EVEN": b % shape.BM == 0 and n % shape.BN == 0, "FAR": furthest >= FAR,
            "num_warps": shape.warps, "num_stages": shape.stages,
        }  # fmt: skip


@lru_cache(maxsize=256)
def runs_of(b: int, n: int, shape: Tile, processors: int) -> tuple[int, int]:
    """(keys of a run, runs): so many that the card's multiprocessors finish together, and no more.

    With p programs per run of all keys and m multiprocessors, r runs take ceil(p r / m) rounds of 1 / r each.
    """
    programs, tiles = math.ceil(b / shape.BM), math.ceil(n / shape.BN)
    slots = processors * shape.per_processor
    most = min(tiles, MOST_RUNS, max(1, math.ceil(8 * slots / programs)))

    def rounds(runs: int) -> float:
        return math.ceil(programs * runs / slots) * math.ceil(tiles / runs)

    best = min(rounds(runs) for runs in range(1, most + 1))
    runs = next(runs for runs in range(1, most + 1) if rounds(runs) <= 1.04 * best)
    run = math.ceil(tiles / runs) * shape.BN
    return run, math.ceil(n / run)


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # interpreted: few enough that tests see both one run and several
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _spans(b: int, n: int, shape: tuple[int, int], diagonal: int | None) -> Iterator[tuple[slice, slice, int | None]]:
    """Rows, columns, and where the diagonal begins as seen from there (None: no part of it is there)."""
    for row in range(0, b, shape[0]):
        rows = slice(row, min(row + shape[0], b))
        for column in range(0, n, shape[1]):
            columns = slice(column, min(column + shape[1], n))
            shifted = None if diagonal is None else diagonal + row - column
            if shifted is not None and not -(rows.stop - row) < shifted < columns.stop - column:
                shifted = None
            yield rows, columns, shifted


def _numbers(side: Weights | None, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (unused, unused, unused) if side is None else (side.rate, side.shift, side.factor)


def _pointers(mask: Mask | None, unused: Tensor) -> list[Tensor]:
    """The kernels' groups of rows and columns, two times, and limits of rows and of columns.

    Kernels read them one after another, and what is given may be a column, or every W-th number, of something.
    """
    if mask is None:
        return [unused] * 6
    pairs = list(zip(mask.row_groups, mask.column_groups, strict=True))
    groups = [x.contiguous() for pair in pairs for x in pair] + [unused] * (4 - 2 * len(pairs))
    return groups + [unused if x is None else x.contiguous() for x in (mask.row_limit, mask.column_limit)]


def _masked(mask: Mask | None) -> dict[str, Any]:
    """What the kernels are compiled for by a mask."""
    mask = mask or Mask()
    return {"GROUPS": len(mask.row_groups), "ONLY_SAME": mask.only_same, "LIMITED": mask.limited}


def _add_gradients(
    weights: Sequence[Tensor],
    a: Operand,
    k: Operand,
    d_anchors: Tensor | None,
    d_keys: Tensor | None,
    r: slice,
    c: slice,
) -> None:
    if d_anchors is not None:
        add_product(d_anchors[r], weights, k.parts)
    if d_keys is not None:
        add_product(d_keys[c], [w.T for w in weights], a.parts)


def _on(device: torch.device) -> Any:
    """Launches go to the tensors' device, not to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
