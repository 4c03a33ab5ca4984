"""A loop of one's own: any encoders, DistributedDataParallel, a batch of 4,096 with the activations of 64.

torchrun --nproc-per-node 2 examples/ddp_loop.py     # or python examples/ddp_loop.py
"""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from amclr_scale import GradientCache
from amclr_scale.similarity import contrast

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("batch", type=int, nargs="?", default=4096)
parser.add_argument("steps", type=int, nargs="?", default=20)
BATCH, STEPS = vars(parser.parse_args()).values()


class Encoder(nn.Module):
    """Yours."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 16))
        self.text = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 16))
        self.scale = nn.Parameter(torch.tensor([2.6]))

    def forward(self, images, texts):
        image, text = F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)
        return {"image": image, "text": text, "scale": self.scale.exp()}


def loss(out):
    """CLIP's, over all ranks: no gather, no B x B matrix, no factor of the number of ranks."""
    temperature = 1 / out["scale"]
    both = contrast(out["image"], out["text"], temperature=temperature)
    return sum((side.log_sum - side.positive / temperature).mean() for side in (both.image, both.text)) / 2


if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
torch.manual_seed(0)
model = Encoder()
to_image, to_text = torch.randn(8, 32), torch.randn(8, 24)  # pairs that belong together are two views of one thing
wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
cache = GradientCache(wrapped, micro_batch_size=64, shared=["scale"])
torch.manual_seed(1 + rank)
for step in range(STEPS):
    things = torch.randn(BATCH // world, 8)
    optimizer.zero_grad()
    value = cache(loss, things @ to_image, things @ to_text)
    optimizer.step()
    if rank == 0:
        print(f"step {step + 1}: loss {value.item():.4f}")
if dist.is_initialized():
    dist.destroy_process_group()
