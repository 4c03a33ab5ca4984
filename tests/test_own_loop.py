"""The gradient cache in loops of one's own gives the gradient of one pass over the whole batch, under any wrapper."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale import GradientCache
from amclr_scale.errors import UserError
from amclr_scale.similarity import contrast


class Towers(nn.Module):
    """Two small towers with dropout and BatchNorm, and a learned scale."""

    def __init__(self, dropout: float = 0.0, norm: bool = False):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(),
                                   nn.Dropout(dropout), nn.Linear(8, 4))  # fmt: skip
        self.text = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.double()

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        image, text = F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)
        return {"image": image, "text": text, "scale": self.scale.exp()}


def clip_loss(out: dict[str, Tensor]) -> Tensor:
    """Over all ranks; each returns its own rows' mean."""
    t = 1 / out["scale"]
    both = contrast(out["image"], out["text"], temperature=t)
    return sum((side.log_sum - side.positive / t).mean() for side in (both.image, both.text)) / 2


def plain_loss(out: dict[str, Tensor]) -> Tensor:
    """Its definition, on one rank."""
    s = out["scale"] * out["image"] @ out["text"].T
    here = torch.arange(len(s))
    return (F.cross_entropy(s, here) + F.cross_entropy(s.T, here)) / 2


def inputs(rows: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return tuple(torch.randn(rows, n, generator=g, dtype=torch.float64) for n in (6, 5))  # type: ignore[return-value]


def towers(**keys) -> Towers:
    torch.manual_seed(1)
    return Towers(**keys)


def check(found: nn.Module, want: nn.Module) -> None:
    for (name, p), q in zip(found.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14, msg=name)
    for (name, b), c in zip(found.named_buffers(), want.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize(("size", "kept"), [(4, None), (6, 0), (4, 4), (16, None), (99, 0)])
def test_dropout_and_statistics_as_in_one_pass(size, kept):
    found, want = towers(dropout=0.3, norm=True), towers(dropout=0.3, norm=True)
    x, y = inputs()
    torch.manual_seed(7)
    value = GradientCache(found, size, shared=["scale"], kept=kept)(plain_loss, x, y)
    torch.manual_seed(7)
    parts = [want(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("image", "text")}
    loss = plain_loss({**joined, "scale": want.scale.exp()})
    loss.backward()
    assert value.item() == pytest.approx(loss.item(), rel=1e-12)
    check(found, want)


def test_one_tower_for_questions_and_answers_and_gradients_that_add_up():
    """Dictionaries as tokenizers give them, several answers to a question, a loss with a weight of its own."""
    torch.manual_seed(0)
    tower, again = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    again.load_state_dict(tower.state_dict())
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    asked = {"x": torch.randn(12, 5).double(), "mask": torch.rand(12, 5).round().double()}
    answers = torch.randn(12, 3, 5).double()

    def encode(model):
        return lambda asked, answers: (model(asked["x"] * asked["mask"]), model(answers.flatten(0, 1)).view(-1, 3, 4))

    def loss(out):
        question, answer = out
        return weight * F.cross_entropy(question @ answer.flatten(0, 1).T, 3 * torch.arange(12))

    cache = GradientCache(encode(tower), 5, models=[tower])
    for _ in range(2):
        cache(loss, asked, answers)
    own, weight.grad = weight.grad, None
    (2 * loss(encode(again)(asked, answers))).backward()
    check(tower, again)
    torch.testing.assert_close(own, weight.grad)


def test_what_cannot_be_is_told():
    x, y = inputs(8)
    with pytest.raises(
        UserError, match=r"^encode: expected tensors with 4 rows, .*, got shape \(1,\) at 'scale'; name it"
    ):
        GradientCache(towers(), 4)(plain_loss, x, y)
    with pytest.raises(UserError, match=r"^inputs: expected as many rows in each, at least 1, got 7, 8"):
        GradientCache(towers(), 4, shared=["scale"])(plain_loss, x, y[:7])
    with pytest.raises(UserError, match=r"^inputs: expected tensors with a row for each sample, got str"):
        GradientCache(towers(), 4)(plain_loss, x, "a text")
    with pytest.raises(UserError, match=r"^inputs: expected tensors with a row for each sample, got NoneType"):
        GradientCache(towers(), 4)(plain_loss, x, None)
    with pytest.raises(UserError, match=r"^inputs: expected tensors with a row for each sample, got none"):
        GradientCache(towers(), 4)(plain_loss)
    with pytest.raises(UserError, match=r"^micro_batch_size: expected at least 1, got 0"):
        GradientCache(towers(), 0)


def test_towers_on_two_gpus_of_one_process_are_refused(monkeypatch):
    places = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    model = nn.Linear(1, 1)
    monkeypatch.setattr(model, "parameters", lambda: places)
    for number, place in enumerate(places):
        place.__class__ = type("There", (nn.Parameter,), {"device": torch.device("cuda", number)})
    with pytest.raises(UserError, match=r"^models: expected parameters on one GPU, got cuda:0 and cuda:1"):
        GradientCache(model, 2)


def test_a_function_that_moves_its_inputs_to_a_gpu_draws_the_same_there(monkeypatch):
    """Nothing that the cache is given lies there; the generator of CUDA is played by a list."""
    gpu = [0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor(gpu[0]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: gpu.__setitem__(0, int(state)))
    weight, drawn = torch.ones(3, requires_grad=True), []

    def encode(x: Tensor) -> Tensor:
        gpu[0] += 1
        drawn.append((int(x[0, 0]), gpu[0]))
        return x * weight

    GradientCache(encode, 2, kept=0)(lambda out: out.sum(), torch.arange(6.0)[:, None].expand(6, 3))
    assert drawn[:3] == drawn[3:] == [(0, 1), (2, 2), (4, 3)]
    assert gpu == [3]


def wrapped(kind: str) -> tuple[nn.Module, dict]:
    model = towers(dropout=0.0)
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model), {}
    if kind == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        return accelerator.prepare(model), {"backward": accelerator.backward}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.image, model.text, model):
        fully_shard(part, mesh=mesh)
    return model, {}


def gradients_under(kinds: list[str]) -> dict[str, dict[str, Tensor]]:
    """On each rank, with its share of the batch: gradients by parameter, and how often wrappers exchanged any."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29876")  # accelerate looks for them; nobody listens there
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
    found: dict[str, dict[str, Tensor]] = {}
    for kind in kinds:
        model, options = wrapped(kind)
        cache = GradientCache(model, 3, shared=["scale"], **options)
        cache(clip_loss, *(one[mine] for one in inputs()))
        named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        found[kind] = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in named.items()}
    return found


def test_wrappers_average_what_several_micro_batches_leave(ranks):
    want = towers()
    plain_loss(want(*inputs())).backward()
    for found in ranks(2, gradients_under, ["ddp", "fsdp2", "accelerate"]):
        assert list(found) == ["ddp", "fsdp2", "accelerate"]
        for kind, gradients in found.items():
            for name, p in want.named_parameters():
                torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-7, msg=f"{kind} {name}")
