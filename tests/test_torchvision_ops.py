"""torchvision imports beside any torch, and what is missing stays missing rather than pretending."""

import pytest
import torch

from amclr_scale.torchvision_ops import SCHEMAS, import_torchvision


def test_transforms_and_models_work_and_a_missing_operator_still_raises():
    assert import_torchvision() is import_torchvision()
    from torchvision.models import resnet18
    from torchvision.transforms import v2

    assert v2.CenterCrop(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)
    assert resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    assert all(hasattr(torch.ops.torchvision, name) for name in SCHEMAS)
    whole = torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU")
    if not whole:
        with pytest.raises(NotImplementedError):
            torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
