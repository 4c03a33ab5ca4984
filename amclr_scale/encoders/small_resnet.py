"""A residual network for small pictures on small machines: 0.3 M parameters at width 16 and depth 10.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385: basic blocks, four stages of
width w, 2w, 4w, 8w, without the large stem that takes a 32-pixel picture apart before the first block.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.encoders.norms import BatchNorm, group_norm

BLOCKS_PER_STAGE = {10: 1, 18: 2}
# The oneDNN of PyTorch 2.13 writes beyond its buffers in the backward pass of a 1x1 convolution with a stride, fewer
# input channels than this, channels last, and a batch that its threads do not divide: the process dies, or goes on.
FEWEST_CHANNELS_OF_A_STRIDE = 16
LARGEST_FIRST_MAP = 48  # pixels; larger pictures are halved in the stem until the first stage sees no more


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return BatchNorm(channels) if batch_norm else group_norm(channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, batch_norm: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = _norm(width, batch_norm)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = _norm(width, batch_norm)
        self.shortcut: nn.Module = nn.Identity()
        self.skipped = 1  # of the shortcut's input, every so many rows and columns are read
        if stride > 1 or width_in != width:
            if width_in < FEWEST_CHANNELS_OF_A_STRIDE:
                self.skipped, stride = stride, 1
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), _norm(width, batch_norm))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        read = x[..., :: self.skipped, :: self.skipped]
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(read), inplace=True)


class SmallResNet(nn.Module):
    """(b, 3, H, W) -> (b, 8 width), the mean over the last map.

    Args:
        width: channels of the first stage.
        depth: 10 or 18.
        image_size: side of the pictures, which decides how much the stem shrinks them.
        batch_norm: BatchNorm instead of GroupNorm.
    """

    def __init__(self, width: int, depth: int, image_size: int, *, batch_norm: bool = False):
        super().__init__()
        self.width = 8 * width
        self.stem, channels, side = nn.Sequential(), 3, image_size
        while True:
            stride = 2 if side > LARGEST_FIRST_MAP else 1
            self.stem.extend(
                [nn.Conv2d(channels, width, 3, stride, 1, bias=False), _norm(width, batch_norm), nn.ReLU(True)]
            )
            channels, side = width, -(-side // stride)
            if side <= LARGEST_FIRST_MAP:
                break
        self.stages = nn.Sequential()
        for stage in range(4):
            for index in range(BLOCKS_PER_STAGE[depth]):
                stride = 2 if stage > 0 and index == 0 else 1
                self.stages.append(BasicBlock(channels, width << stage, stride, batch_norm))
                channels = width << stage
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stages(self.stem(x)).mean((2, 3))
        return out
