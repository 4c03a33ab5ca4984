"""The gradient cache in a LightningModule: manual optimization, and one call for the step.

python examples/lightning_loop.py
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from amclr_scale import GradientCache
from amclr_scale.similarity import contrast
from amclr_scale.torchvision_ops import import_torchvision

with suppress(ImportError):  # where it is installed, and built for another torch: lightning imports it
    import_torchvision()
import lightning

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("batch", type=int, nargs="?", default=4096)
parser.add_argument("steps", type=int, nargs="?", default=20)
BATCH, STEPS = vars(parser.parse_args()).values()


class Clip(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.image = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 16))
        self.text = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, images, texts):
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)

    def loss(self, rows):
        both = contrast(*rows, temperature=0.07)
        return sum((side.log_sum - side.positive / 0.07).mean() for side in (both.image, both.text)) / 2

    def training_step(self, batch, number):
        wrapped = self.trainer.strategy.model  # DistributedDataParallel's, where there are several ranks
        cache = GradientCache(wrapped if wrapped is not self else self, 64, backward=self.manual_backward)
        self.optimizers().zero_grad()
        value = cache(self.loss, *batch)
        self.optimizers().step()
        print(f"step {number + 1}: loss {value.item():.4f}")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


lightning.seed_everything(0, verbose=False)
things = torch.randn(BATCH * STEPS, 8)
pairs = TensorDataset(things @ torch.randn(8, 32), things @ torch.randn(8, 24))  # two views of one thing
trainer = lightning.Trainer(
    max_steps=STEPS, accelerator="auto" if torch.cuda.is_available() else "cpu", devices=1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Clip(), DataLoader(pairs, batch_size=BATCH))
