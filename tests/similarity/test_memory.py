"""Peak memory of a step, measured in a fresh process: whatever B is, some tiles beyond inputs and gradients."""

import subprocess
import sys

import pytest

STEP = """
import ctypes

import torch
from amclr_scale.similarity import {imports}, using

torch.set_num_threads(1)


def kib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


def step(B):
    image, text = (torch.nn.functional.normalize(torch.randn(B, {D}), dim=1).requires_grad_() for _ in range(2))
    t = torch.tensor([0.05], requires_grad=True)
    ctypes.CDLL(None).malloc_trim(0)  # so that nothing freed before counts as ours
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # forget the peak so far
    before = kib("VmRSS")
    {loss}.backward()
    peak = kib("VmHWM")
    assert image.grad.isfinite().all() and text.grad.isfinite().all() and t.grad.isfinite().all()
    return peak - before - 2 * B * {D} * 4 // 1024


step(1100)  # what libraries allocate once
print(step({B}))
"""

CONTRAST = "sum(x.log_sum - x.positive / t for x in vars(contrast(image, text, temperature=t)).values()).mean()"
PAIRWISE = "pairwise(image, text, 1 / t, -1 / t)"


def peak_mib(imports: str, loss: str, B: int, D: int) -> float:
    """Beyond the features and their gradients."""
    code = STEP.format(imports=imports, loss=loss, B=B, D=D)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=280)
    assert answer.returncode == 0, answer.stderr
    return int(answer.stdout) / 1024


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")


@linux
@pytest.mark.slow
@pytest.mark.launch
def test_a_batch_of_16384_needs_less_than_64_mib():
    """A dense loss needs about 5 GiB: several float32 matrices of 16,384 x 16,384, 1 GiB each."""
    assert peak_mib("contrast", CONTRAST, 16384, 512) < 64


@linux
@pytest.mark.launch
def test_sigmoid_losses_too():
    assert peak_mib("pairwise", PAIRWISE, 8192, 64) < 32  # one float32 matrix: 256 MiB
