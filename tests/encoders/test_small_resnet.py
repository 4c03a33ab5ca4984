"""The residual tower for small pictures: what it computes, and where the libraries below it would die."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.encoders.small_resnet import FEWEST_CHANNELS_OF_A_STRIDE, BasicBlock


@pytest.mark.parametrize("width", [FEWEST_CHANNELS_OF_A_STRIDE - 4, FEWEST_CHANNELS_OF_A_STRIDE])
def test_a_narrow_shortcut_is_the_convolution_with_a_stride(width):
    torch.manual_seed(0)
    block = BasicBlock(width, 2 * width, 2, batch_norm=False).double()
    x = torch.randn(3, width, 7, 8, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    block.shortcut[0].register_forward_hook(lambda module, args, out: seen.append(out))
    block(x)
    assert torch.allclose(seen[0], F.conv2d(x, block.shortcut[0].weight, stride=2), atol=1e-12)


LEARN = """
import torch
from amclr_scale.encoders.small_resnet import SmallResNet

torch.set_num_threads(2)
tower = SmallResNet(8, 10, 16).to(memory_format=torch.channels_last)
for _ in range(8):
    for batch in (3, 5):
        tower(torch.randn(batch, 3, 16, 16).contiguous(memory_format=torch.channels_last)).sum().backward()
"""


def test_a_narrow_tower_learns_on_two_threads():
    done = subprocess.run([sys.executable, "-c", LEARN], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
