"""The losses that tools/benchmark_similarity.py compares: ours, open_clip's, Inf-CL's, FastCLIP's, and products."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.similarity import contrast, pairwise, using
from amclr_scale.similarity.precision import add_product
from amclr_scale.torchvision_ops import import_torchvision

TEMPERATURE = 0.05
BIAS = -10.0


@dataclass
class Features:
    """One rank's rows, and the numbers that a loss learns."""

    image: Tensor  # (b, D)
    text: Tensor  # (b, D)
    scale: Tensor  # (1,)
    bias: Tensor  # (1,)
    rank: int
    world_size: int

    @classmethod
    def draw(cls, batch: int, width: int, rank: int, world_size: int, device: torch.device) -> "Features":
        generator = torch.Generator(device).manual_seed(rank)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        image, text = torch.randn(2, batch // world_size, width, generator=generator, device=device)
        image, text = F.normalize(image, dim=1), F.normalize(text + image, dim=1)
        numbers = torch.tensor([1 / TEMPERATURE]), torch.tensor([BIAS])
        image, text = (x.to(device, dtype).requires_grad_() for x in (image, text))
        scale, bias = (x.to(device).requires_grad_() for x in numbers)
        return cls(image, text, scale, bias, rank, world_size)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.image, self.text, self.scale, self.bias

    def step(self, loss: Callable[["Features"], Tensor | None]) -> float:
        for leaf in self.leaves:
            leaf.grad = None
        value = loss(self)
        if value is None:
            return math.nan
        value.backward()
        return float(value.detach())


def clip(**settings: Any) -> Callable[[Features], Tensor]:
    def loss(f: Features) -> Tensor:
        with using(**settings):
            c = contrast(f.image, f.text, temperature=1 / f.scale, centred=True)
        return (c.image.log_sum.mean() + c.text.log_sum.mean()) / 2

    return loss


def clip_cached(f: Features) -> Tensor:
    return clip(cache_bytes=4 * len(f.image) ** 2 * f.world_size)(f)


def using_torch(method: Callable[[Features], Tensor]) -> Callable[[Features], Tensor]:
    def loss(f: Features) -> Tensor:
        with using(backend="torch"):
            return method(f)

    return loss


def siglip(f: Features) -> Tensor:
    return pairwise(f.image, f.text, f.scale, f.bias)


def sogclr(f: Features) -> Tensor:
    c = contrast(f.image, f.text, temperature=TEMPERATURE, centred=True, exclude_positive=True)
    log_g = [side.log_sum - math.log(c.num_keys) for side in (c.image, c.text)]
    return sum((x - x.detach()).exp().mean() for x in log_g)  # type: ignore[return-value]


def fp32_rows(**settings: Any) -> Callable[[Features], Tensor]:
    """CLIP's loss of float32 rows, as towers hand them out; the gradient goes on to the rows as they were drawn."""

    def loss(f: Features) -> Tensor:
        with using(**settings):
            c = contrast(f.image.float(), f.text.float(), temperature=1 / f.scale, centred=True)
        return (c.image.log_sum.mean() + c.text.log_sum.mean()) / 2

    return loss


def as_its_users_do(f: Features) -> torch.autocast:
    """open_clip's precision `amp_bf16` where features are bfloat16; nothing for float32."""
    return torch.autocast(f.image.device.type, dtype=torch.bfloat16, enabled=f.image.dtype == torch.bfloat16)


def open_clip(f: Features) -> Tensor:
    import_torchvision()  # before open_clip imports it
    from open_clip.loss import ClipLoss

    ranks = f.world_size > 1
    loss = ClipLoss(local_loss=ranks, gather_with_grad=ranks, rank=f.rank, world_size=f.world_size)
    with as_its_users_do(f):
        return loss(f.image, f.text, f.scale)  # type: ignore[no-any-return]


def open_clip_compiled(f: Features) -> Tensor:
    with as_its_users_do(f):
        return _compiled()(f.image, f.text, f.scale)  # type: ignore[no-any-return]


_COMPILED: list[Any] = []


def _compiled() -> Any:
    import_torchvision()
    from open_clip.loss import ClipLoss

    if not _COMPILED:
        _COMPILED.append(torch.compile(ClipLoss()))
    return _COMPILED[0]


def open_siglip(f: Features) -> Tensor:
    import_torchvision()
    from open_clip.loss import SigLipLoss

    with as_its_users_do(f):
        return SigLipLoss(rank=f.rank, world_size=f.world_size)(f.image, f.text, f.scale, f.bias)  # type: ignore[no-any-return]


def fastclip(f: Features) -> Tensor:
    """FastCLIP (arXiv:2407.01445) by its definition, dense, at its first visit (u = g), one process.

    Anchors of this rank against all keys without gradient, and all anchors without gradient against this rank's keys.
    As in the published loss the positives are masked by integers of 64 bits, kept beside their inverse.
    """
    own = (f.image * f.text).sum(1).detach()
    positives = torch.eye(len(own), dtype=torch.int64, device=own.device)
    keep = 1 - positives
    n = len(own) - 1
    total = f.image.new_zeros(())
    log_u: list[Tensor] = []
    for anchors, keys in ((f.image, f.text.detach()), (f.text, f.image.detach())):
        s = anchors @ keys.T
        positive = s.diagonal()
        rows = ((s - positive[:, None]) / TEMPERATURE).exp() * keep
        log_u.append(rows.sum(1).detach() / n)
        total = total + (rows.sum(1) / n / log_u[-1]).mean() / 2
        columns = ((s - own[None, :]) / TEMPERATURE).exp() * keep
        total = total + (columns.sum(0) / n / (columns.sum(0).detach() / n)).mean() / 2
    return total


def inf_cl(f: Features) -> Tensor:
    from inf_cl import cal_flash_loss

    image_rows, text_rows = (cal_flash_loss(a, k, scale=f.scale) for a, k in ((f.image, f.text), (f.text, f.image)))
    return (image_rows.mean() + text_rows.mean()) / 2  # type: ignore[no-any-return]


def floor(f: Features) -> None:
    """The products of `clip`: similarities twice, and the gradients of both towers; reads only this rank's rows."""
    image, text = f.image.detach(), f.text.detach().repeat(f.world_size, 1)
    d_image, d_text = (torch.zeros_like(x, dtype=torch.float32) for x in (image, text))
    rows, columns = (8192, 8192) if image.is_cuda else (1024, len(text))
    panel = image.new_empty(min(rows, len(image)), min(columns, len(text)))
    for first in range(0, len(image), rows):
        a = image[first : first + rows]
        for start in range(0, len(text), columns):
            k = text[start : start + columns]
            block = panel[: len(a), : len(k)]
            for _ in range(2):
                torch.mm(a, k.T, out=block)
            add_product(d_image[first : first + rows], [block], [k])
            add_product(d_text[start : start + columns], [block.T], [a])


@dataclass(frozen=True)
class Method:
    loss: Callable[[Features], Tensor | None]
    family: str  # ratios are taken to the family's reference
    ranks: tuple[int, ...] = (1, 2)
    bytes_per_pair: int = 0  # of memory, for each of b B similarities
    cuda_only: bool = False
    needs: str = ""  # a package that may be missing
    products: int = 4  # of 2 b B D operations that have to be computed


METHODS = {
    "open_clip": Method(open_clip, "clip", bytes_per_pair=17, needs="open_clip"),
    "open_clip, compiled": Method(
        open_clip_compiled, "clip", (1,), bytes_per_pair=17, cuda_only=True, needs="open_clip"
    ),
    "inf_cl": Method(inf_cl, "clip", (1,), cuda_only=True, needs="inf_cl"),
    "floor": Method(floor, "clip"),
    "clip": Method(clip(), "clip", (1,)),
    "clip, torch": Method(clip(backend="torch"), "clip", (1,), cuda_only=True),
    "clip, fp32 rows": Method(fp32_rows(), "clip", (1,), cuda_only=True),
    "clip, fp32 rows, torch": Method(fp32_rows(backend="torch"), "clip", (1,), cuda_only=True),
    "clip, fp32 rows, split": Method(fp32_rows(precision="split"), "clip", (1,), cuda_only=True),
    "clip, fp32 rows, bf16": Method(fp32_rows(precision="bf16"), "clip", (1,), cuda_only=True),
    "clip, cached": Method(clip_cached, "clip", bytes_per_pair=4),
    "clip, reduce_scatter": Method(clip(distribution="reduce_scatter"), "clip", (2,)),
    "clip, column_sums": Method(clip(distribution="column_sums"), "clip", (2,)),
    "clip, two_blocks": Method(clip(distribution="two_blocks"), "clip", (2,)),
    "clip, ring": Method(clip(gather="ring"), "clip", (2,)),
    "open_clip siglip": Method(open_siglip, "siglip", bytes_per_pair=20, needs="open_clip", products=3),
    "siglip": Method(siglip, "siglip", products=3),
    "siglip, torch": Method(using_torch(siglip), "siglip", (1,), cuda_only=True, products=3),
    "fastclip, dense": Method(fastclip, "sogclr", (1,), bytes_per_pair=64),
    "sogclr": Method(sogclr, "sogclr", (1,)),
}
REFERENCES = {"clip": "open_clip", "siglip": "open_clip siglip", "sogclr": "fastclip, dense"}
