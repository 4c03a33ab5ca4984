"""The last layer's gradient, from notes of what it read and gave, is autograd's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from amclr_scale.engine.last_layer import LastLayer
from amclr_scale.similarity import rank, world_size
from tests.objectives.harness import close

K, READ, D = 8, 5, 4


class Heads(nn.Module):
    """Features with a view each of the images, a plain head and one with a bias and a layer before it."""

    def __init__(self, more: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.image_head = nn.Sequential(nn.Dropout(0.5), nn.Linear(READ, D, bias=False)).double().eval()
        text = [nn.Linear(READ, READ), nn.GELU(), nn.Linear(READ, D), *([nn.Softmax(1)] if more else [])]
        self.text_head = nn.Sequential(*text).double()

    def forward(self, rows: slice) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(1)
        image, view, text = torch.randn(3, K, READ, generator=g, dtype=torch.float64)[:, rows]
        images = F.normalize(self.image_head(torch.cat([image, view])), dim=1)
        first, second = images.chunk(2)
        return {"image": first, "image_views.0": second, "text": F.normalize(self.text_head(text), dim=1)}


def gradient_of(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return {name: torch.randn(K, D, generator=g, dtype=torch.float64) for name in rows}


def noted(more: bool = False) -> dict[str, torch.Tensor]:
    """By this rank, whose samples come in calls of two."""
    model, b = Heads(more), K // world_size()
    layer, mine = LastLayer({"image": 2, "text": 1}), slice(rank() * b, (rank() + 1) * b)
    with layer.noted(model), torch.no_grad():
        for start in range(mine.start, mine.stop, 2):
            model(slice(start, start + 2))
    everything = model(slice(None))
    layer.forget_others({name: x.detach() for name, x in everything.items()}, mine)
    return layer(gradient_of(everything), mine)


@pytest.mark.parametrize("size", [1, 2])
def test_it_is_autograd_s(ranks, size):
    model = Heads()
    everything = model(slice(None))
    gradients = gradient_of(everything)
    sum((everything[name] * gradients[name]).sum() for name in everything).backward()
    want = {
        "image.weight": model.image_head[1].weight.grad,
        "text.weight": model.text_head[2].weight.grad,
        "text.bias": model.text_head[2].bias.grad,
    }
    for got in ranks(size, noted) if size > 1 else [noted()]:
        assert set(got) == set(want)
        for name, x in want.items():
            close(got[name], x, 1e-12, name)


def test_a_head_that_does_more_after_its_last_linear_layer_is_left_aside():
    assert set(noted(more=True)) == {"image.weight"}


def test_no_hook_is_left_behind():
    model = Heads()
    with LastLayer({"image": 1, "text": 1}).noted(model):
        model(slice(None))
    assert not any(layer._forward_hooks for layer in model.modules())


def test_hard_negatives_have_names_of_their_own():
    model, layer = Heads(), LastLayer({"image": 2, "text": 1}, {"image": 1})
    with layer.noted(model), torch.no_grad():
        rows = model(slice(None))
    layer.forget_others({"image_negatives.0" if "views" in name else name: x for name, x in rows.items()}, slice(0, K))
    assert layer.notes.keys() == {"image", "image_negatives.0", "text"}
