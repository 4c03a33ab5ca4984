"""Some neighbouring samples of a batch, as a worker makes them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fault:
    """One sample that could not be used."""

    kind: str
    sample: int  # id
    shard: str
    key: str
    detail: str

    @property
    def words(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass
class Part:
    """Some neighbouring samples of a batch."""

    ids: Tensor  # (n,) int64
    text_ids: Tensor | None  # (n,) int64, where images have ids of their own
    images: tuple[Tensor, ...]  # 1 + V of (n, 3, H, W) uint8, and hard negatives; where devices make them, (n, R) rows
    texts: tuple[Tensor, ...]  # 1 + V of (n, L) int64, and hard negatives
    given: dict[str, Tensor]  # (n, ...) that no tower reads: `Batch.given`
    faults: list[Fault]
    repeated: dict[str, int]  # further images and texts that equal an earlier view; hard negatives that there are not
    pixels: Tensor | None = None  # (P, 3) uint8, that the rows are about (data/augmentation/shipping.py)
