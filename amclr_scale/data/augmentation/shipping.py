"""What a worker gives in place of views that the device makes: pixels of decoded pictures, and rows of numbers.

A row says what to make of them: where the view's pixels lie, which crop is resized to the view's size (`Cut`), and the
operations that follow (`plans.encode`). It is int64 throughout, so that the rows of a batch are one tensor.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from amclr_scale.config import schema
from amclr_scale.data.augmentation.cropping import AT_ONCE, MOST_REDUCED, Cut, cut_of, window_of
from amclr_scale.data.augmentation.plans import Box, Operation, encode, plan_view
from amclr_scale.data.randomness import Draws

COLUMNS = len(Cut._fields)
MOST_SENT = 4  # times the pixels of its views; of a larger picture the worker sends its views, resized there

Plan = tuple[Box, list[Operation]]
Recipe = tuple[schema.ImageAugmentation, Draws]


class Shipment:
    """The pixels of a part's pictures, one after another, and the rows of its views.

    Args:
        size: of views, in pixels a side.
        steps: operations of a row.
        of_base: places of the views that are made of the first one, whose start is that of its sample in its part.
    """

    def __init__(self, size: int, steps: int, of_base: range):
        self.size, self.steps, self.of_base = size, steps, of_base
        self._pixels, self._count = list[NDArray[np.uint8]](), 0

    def rows(self, pictures: Sequence[Image.Image], recipes: Sequence[Recipe]) -> list[Tensor]:
        """Take the pixels that some views need.

        Args:
            pictures: decoded RGB, what each view shows; several may show the same one.
            recipes: of each.

        Returns:
            Each view's row.
        """
        plans = self._plans([picture.size for picture in pictures], recipes)
        found = {view: self._row_of_base(plans[view]) for view in self.of_base}
        for picture in {id(each): each for each in pictures}.values():
            views = [view for view, each in enumerate(pictures) if each is picture and view not in self.of_base]
            if views:
                found |= zip(views, self._sent(picture, [plans[view] for view in views]), strict=True)
        return [found[view] for view in range(len(pictures))]

    def rows_of_held(
        self, sizes: Sequence[tuple[int, int]], starts: Sequence[int], recipes: Sequence[Recipe]
    ) -> list[Tensor]:
        """The same of pictures that the device holds: their width and height, and how many pixels lie before them."""
        plans, found = self._plans(sizes, recipes), list[Tensor]()
        for view, (box, operations) in enumerate(plans):
            width, height = sizes[view]
            cut = cut_of(box, width, height, self.size, (0, 0, width, height), starts[view])
            found.append(self._row_of_base(plans[view]) if view in self.of_base else self._row(cut, operations))
        return found

    def row_of_one(self, picture: Image.Image, draws: Draws, recipe: schema.ImageAugmentation) -> Tensor:
        """The row of a view of a picture by itself, whose pixels are taken."""
        return self._sent(picture, [plan_view(*picture.size, recipe, draws, self.size)])[0]

    def blank(self) -> Tensor:
        """The row of a black view, in place of one that there is not."""
        return self._sent(Image.new("RGB", (1, 1)), [((0, 0, 1, 1), [])])[0]

    def pixels(self) -> Tensor:
        """(P, 3) uint8."""
        return torch.from_numpy(np.concatenate([np.empty((0, 3), np.uint8), *self._pixels]))

    def _plans(self, sizes: Sequence[tuple[int, int]], recipes: Sequence[Recipe]) -> list[Plan]:
        own = self.size, self.size
        sizes = [own if view in self.of_base else size for view, size in enumerate(sizes)]
        return [plan_view(*size, *recipe, self.size) for size, recipe in zip(sizes, recipes, strict=True)]

    def _row(self, cut: Cut, operations: Sequence[Operation]) -> Tensor:
        """(COLUMNS + 3 steps,) int64."""
        return torch.cat([torch.tensor(cut, dtype=torch.int64), encode(operations, self.steps).flatten()])

    def _row_of_base(self, plan: Plan) -> Tensor:
        box, operations = plan
        return self._row(cut_of(box, self.size, self.size, self.size, (0, 0, self.size, self.size)), operations)

    def _sent(self, picture: Image.Image, plans: Sequence[Plan]) -> list[Tensor]:
        """Each view's row. Of a picture that is much larger than its views these are made here, as far as their size.

        It would take longer to send its pixels than to resize them, and more memory; the bytes are the same.
        """
        size = self.size
        windows = np.array([window_of(box, *picture.size, size) for box, _ in plans])
        left, upper = windows[:, :2].min(0).tolist()
        right, lower = windows[:, 2:].max(0).tolist()
        longest = max(max(box[2] - box[0], box[3] - box[1]) for box, _ in plans)
        most = min(MOST_SENT * len(plans) * size**2, AT_ONCE)  # of which the device resizes at least one at a time
        if (right - left) * (lower - upper) > most or longest > MOST_REDUCED * size:
            rows, whole = list[Tensor](), (0, 0, size, size)
            for box, operations in plans:
                start = self._take(picture.resize((size, size), Image.Resampling.BICUBIC, box))
                rows.append(self._row(cut_of(whole, size, size, size, whole, start), operations))
            return rows
        held = left, upper, right, lower
        start = self._take(picture if held == (0, 0, *picture.size) else picture.crop(held))
        return [self._row(cut_of(box, *picture.size, size, held, start), operations) for box, operations in plans]

    def _take(self, picture: Image.Image) -> int:
        """Returns how many pixels lie before it."""
        start = self._count
        self._pixels.append(np.asarray(picture).reshape(-1, 3))
        self._count += picture.width * picture.height
        return start
