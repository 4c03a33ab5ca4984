"""What each choice of normalisation promises, against BatchNorm over the whole batch in float64."""

import pytest
import torch
from torch import nn

from amclr_scale.config.schema import ImageTower, TextTower
from amclr_scale.encoders.build import unread
from amclr_scale.encoders.norms import (
    BatchNorm,
    FrozenBatchNorm,
    SyncBatchNorm,
    convert_batch_norm,
    group_norm,
    has_batch_norm,
    keep_statistics,
)
from amclr_scale.errors import UserError
from tests.encoders.test_dual_encoder import images, model

SHARES = (5, 2, 4)  # samples of each rank


def data(rows: int = sum(SHARES)) -> torch.Tensor:
    return 3 + 2 * torch.randn(rows, 8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(norm: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1), norm(4)).double()
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 2)
    return net


def loss(y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (y * (rows + 1).view(-1, 1, 1, 1)).square().sum()


def on_a_rank(shares: tuple[int, ...]) -> dict[str, torch.Tensor]:
    import torch.distributed as dist

    rank = dist.get_rank()
    rows = torch.arange(sum(shares[:rank]), sum(shares[: rank + 1]))
    net, x = network(SyncBatchNorm), data()[rows].requires_grad_()
    for _ in range(2):
        loss(net(x), rows).backward()
    sums = {}
    for name, p in net.named_parameters():
        dist.all_reduce(p.grad)
        sums[name] = p.grad
    evaluated = net.eval()(x).detach()
    return sums | {"input": x.grad, "evaluated": evaluated, **dict(net.named_buffers())}


@pytest.mark.parametrize("shares", [SHARES[:2], SHARES])
def test_sync_is_batch_norm_over_all_ranks(ranks, shares):
    """Unequal shares, different data; gradients of the sum of losses with respect to weights and every sample."""
    net, rows = network(nn.BatchNorm2d), torch.arange(sum(shares))
    x = data()[rows].requires_grad_()
    for _ in range(2):
        loss(net(x), rows).backward()
    answers = ranks(len(shares), on_a_rank, shares)
    torch.testing.assert_close(torch.cat([a["input"] for a in answers]), x.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([a["evaluated"] for a in answers]), net.eval()(x).detach())
    for answer in answers:
        for name, want in [*((n, p.grad) for n, p in net.named_parameters()), *net.named_buffers()]:
            torch.testing.assert_close(answer[name], want, rtol=1e-9, atol=1e-9, msg=name)


def test_sync_on_one_rank_is_batch_norm():
    a, b = network(SyncBatchNorm), network(nn.BatchNorm2d)
    torch.testing.assert_close(a(data()), b(data()))


def test_frozen_uses_stored_statistics_in_training():
    net = network(nn.BatchNorm2d)
    net(data())
    want = net.eval()(data()[:2])
    frozen = convert_batch_norm(net, "frozen", pretrained=True).train()
    x = data()[:2]
    torch.testing.assert_close(frozen(x), want)
    before = {name: b.clone() for name, b in frozen.named_buffers()}
    frozen(x).sum().backward()
    assert all(torch.equal(before[name], b) for name, b in frozen.named_buffers())
    assert frozen[1].weight.grad is not None


def test_group_keeps_affine_weights_and_needs_no_company():
    net = network(nn.BatchNorm2d)
    weight = net[1].weight
    grouped = convert_batch_norm(net, "group")
    assert grouped[1].weight is weight
    assert not has_batch_norm(grouped)
    torch.testing.assert_close(grouped(data())[:1], grouped(data()[:1]))


def test_groups_have_eight_channels_where_they_can():
    assert [group_norm(c).num_groups for c in (8, 16, 128, 12)] == [1, 2, 16, 1]


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18", "timm/mobilenetv3_small_100"])
def test_towers_of_libraries_become_independent_of_their_batch(name):
    """Also where an activation is part of the norm."""
    encoder = model(image=ImageTower(name=name, norm="group")).eval()
    assert not has_batch_norm(encoder.image_tower)
    alone = encoder(images=(images()[:1],))["image"]
    torch.testing.assert_close(encoder(images=(images(),))["image"][:1], alone, rtol=1e-3, atol=1e-4)


def test_choices_are_explicit_and_explained():
    with pytest.raises(
        UserError, match=r"^model.image.norm: torchvision/resnet18 uses BatchNorm.*group.*sync.*frozen.*batch"
    ):
        model(image=ImageTower(name="torchvision/resnet18"))
    with pytest.raises(UserError, match=r"^model.image.norm: frozen .*model.image.weights"):
        model(image=ImageTower(norm="frozen"))
    with pytest.raises(UserError, match=r"^model.image.norm: timm/vit_tiny_patch16_224 has no BatchNorm"):
        model(image=ImageTower(name="timm/vit_tiny_patch16_224", norm="sync"))
    assert "execution.micro_batch_size" in model(image=ImageTower(norm="batch")).notes[0]
    assert "number of ranks" in model(image=ImageTower(norm="sync")).notes[0]
    assert model().notes == ()


def test_keys_of_another_tower_are_told():
    tiny = TextTower(name="transformers/distilbert", layers=2, width=32)
    (told,) = unread(tiny, "text")
    assert told == "model.text.width, model.text.layers: read by small_transformer only, not by transformers/distilbert"
    (told,) = model(image=ImageTower(name="timm/resnet18", norm="group", depth=18)).notes
    assert told == "model.image.depth: read by small_resnet only, not by timm/resnet18"
    assert not [*unread(ImageTower(width=8), "image"), *unread(TextTower(name="transformers/bert"), "text")]


def test_a_second_forward_can_leave_the_statistics_alone():
    net = network(nn.BatchNorm2d)
    net(data())
    before = {name: b.clone() for name, b in net.named_buffers()}
    with keep_statistics(net):
        again = net(data()[:4])
    assert all(torch.equal(before[name], b) for name, b in net.named_buffers())
    torch.testing.assert_close(again, net(data()[:4]))
    assert net[1].num_batches_tracked == 2


@pytest.mark.parametrize("norm", [BatchNorm, FrozenBatchNorm, SyncBatchNorm])
def test_half_precision_weights_beside_float32_statistics(norm):
    """As DeepSpeed leaves them; torch's own BatchNorm raises on this pair."""
    wide, half = norm(8), norm(8)
    for module in (wide, half):
        with torch.no_grad():
            module.weight.copy_(torch.arange(1, 9) / 4)
    x = data().bfloat16()
    half.weight.data, half.bias.data = half.weight.data.bfloat16(), half.bias.data.bfloat16()
    with pytest.raises(RuntimeError):
        torch.nn.functional.batch_norm(x, half.running_mean, half.running_var, half.weight, half.bias, True)
    for _ in range(2):
        want, got = wide(x.float()), half(x)
    got.float().square().sum().backward()
    want.square().sum().backward()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(half.weight.grad.float(), wide.weight.grad, rtol=2e-2, atol=1e-1)
    for (name, a), b in zip(half.named_buffers(), wide.buffers(), strict=True):
        assert torch.equal(a, b), name
