"""The gradient cache in a loop of Hugging Face's accelerate, with one tower for questions and answers.

accelerate launch examples/accelerate_loop.py     # or python examples/accelerate_loop.py
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from amclr_scale import GradientCache
from amclr_scale.similarity import contrast

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("batch", type=int, nargs="?", default=4096)
parser.add_argument("steps", type=int, nargs="?", default=20)
BATCH, STEPS = vars(parser.parse_args()).values()


class Retriever(nn.Module):
    """Yours: any text encoder. Both sides in one call, so that wrappers see one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.EmbeddingBag(500, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32))

    def forward(self, questions, answers):
        return tuple(F.normalize(self.tower(ids["input_ids"]), dim=1) for ids in (questions, answers))


def loss(rows):
    both = contrast(*rows, temperature=0.05)
    return sum((side.log_sum - side.positive / 0.05).mean() for side in (both.image, both.text)) / 2


accelerator = Accelerator(cpu=not torch.cuda.is_available())
torch.manual_seed(0)
model = Retriever()
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
cache = GradientCache(model, micro_batch_size=64, backward=accelerator.backward)
torch.manual_seed(1 + accelerator.process_index)
for step in range(STEPS):
    questions = torch.randint(0, 500, (BATCH // accelerator.num_processes, 12), device=accelerator.device)
    answers = questions[:, torch.randperm(12)[:8]]  # some of the same words, in another order
    optimizer.zero_grad()
    value = cache(loss, {"input_ids": questions}, {"input_ids": answers})
    optimizer.step()
    accelerator.print(f"step {step + 1}: loss {value.item():.4f}")
accelerator.end_training()
