"""Pixels that a tower's first windows leave out: at the right and at the bottom, where no whole window has room."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Window = nn.Conv2d | nn.Unfold


@dataclass(frozen=True)
class _Cells:
    """What a grid of windows sees of one side of the image: cell c the pixels c * jump - shift .. + span - 1."""

    count: int
    jump: int = 1
    span: int = 1
    shift: int = 0

    def under(self, windows: Window) -> "_Cells":
        """The grid of windows over this one's cells."""
        kernel, stride, dilation = _last(windows.kernel_size), _last(windows.stride), _last(windows.dilation)
        reach = dilation * (kernel - 1)
        if windows.padding == "same":
            before, padding = reach // 2, reach
        elif windows.padding == "valid":
            before, padding = 0, 0
        else:
            before = _last(windows.padding)
            padding = 2 * before
        count = (self.count + padding - reach - 1) // stride + 1
        return _Cells(count, self.jump * stride, self.span + reach * self.jump, self.shift + before * self.jump)

    @property
    def seen(self) -> int:
        """Pixels up to the end of the last cell."""
        return (self.count - 1) * self.jump - self.shift + self.span


def _last(value: Any) -> int:
    """Along the width, of a number or of (height, width)."""
    return int(value if isinstance(value, int) else value[-1])


class PatchGrid:
    """Watches one forward of a tower for the windows that look at the image itself: convolutions and unfoldings, one
    behind the other too.

    Args:
        size: side of the square images, in pixels.
    """

    def __init__(self, module: nn.Module, size: int):
        self.size = size
        self._grids: list[tuple[Tensor, _Cells]] = []  # of what windows gave; kept, so that no other has its identity
        self._covered: set[int] = set()  # those that other windows look at
        windows = (part for part in module.modules() if isinstance(part, Window))
        self._hooks = [part.register_forward_hook(self._look) for part in windows]

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def _look(self, windows: Window, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        below = next((i for i, (known, _) in enumerate(self._grids) if known is inputs[0]), None)
        if below is not None:
            cells = self._grids[below][1]
            self._covered.add(below)
        elif inputs[0].shape[1:] == (3, self.size, self.size):
            cells = _Cells(self.size)
        else:
            return  # it does not see the image itself
        self._grids.append((out, cells.under(windows)))

    def unseen(self) -> str:
        """How many rows and columns no window sees, and a size without any; "" where all are seen."""
        ends = [cells for i, (_, cells) in enumerate(self._grids) if i not in self._covered]
        if not ends:
            return ""
        widest = max(ends, key=lambda cells: cells.seen)
        cut = self.size - widest.seen
        if cut <= 0:
            return ""
        whole = self.size - cut
        better = f"a multiple of {widest.jump}" if whole % widest.jump == 0 else f"{whole} or {whole + widest.jump}"
        return (
            f"the last {cut} of {self.size} rows and columns, which are no whole patch of {widest.span} pixels; choose "
            f"{better}"
        )
