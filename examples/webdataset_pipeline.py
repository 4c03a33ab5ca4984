"""webdataset's stages behind this toolkit's order: ids of samples, and a loop that goes on where it was stopped.

python examples/webdataset_pipeline.py 64 20 /tmp/position.pt     # stop it, start it again: no sample comes twice
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.nn.functional as F
import webdataset as wds
from torch import nn

from amclr_scale.data.webdataset import IndexedShards
from amclr_scale.similarity import contrast

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("batch", type=int)
parser.add_argument("steps", type=int)
parser.add_argument("saved", type=Path)
BATCH, STEPS, SAVED = vars(parser.parse_args()).values()

source = IndexedShards("emoji/train", global_batch_size=BATCH, per_item=BATCH, seed=0)  # yours: "shards/{000..099}.tar"


def small(image):
    return torch.tensor(image)[:, :, :3].permute(2, 0, 1).float()[:, ::8, ::8].flatten() / 255


def words(caption):
    return torch.tensor([hash_of(word) for word in (caption.lower().split() + [""] * 8)[:8]])


def hash_of(word):
    return sum(ord(letter) * 31**k for k, letter in enumerate(word)) % 1000


pipeline = wds.DataPipeline(
    source,
    wds.decode("rgb8"),
    wds.to_tuple("webp", "txt", "__id__"),
    wds.map_tuple(small, words),
    wds.batched(BATCH),
)
torch.manual_seed(0)
images, texts = nn.Linear(3 * 8 * 8, 32), nn.EmbeddingBag(1000, 32)
optimizer = torch.optim.Adam([*images.parameters(), *texts.parameters()], lr=1e-2)
step = 0
if SAVED.exists():
    saved = torch.load(SAVED)
    for part, state in zip((images, texts, optimizer), saved["model"], strict=True):
        part.load_state_dict(state)
    source.load_state_dict(saved["data"])
    step = source.samples // BATCH
loader = wds.WebLoader(pipeline, batch_size=None, num_workers=1)
for pixels, tokens, ids in source.follow(loader):
    both = contrast(F.normalize(images(pixels)), F.normalize(texts(tokens)), temperature=0.1)
    loss = sum((side.log_sum - side.positive / 0.1).mean() for side in (both.image, both.text)) / 2
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    print(f"step {step}: loss {loss.item():.6f}, samples {ids[:3]} ...")
    torch.save(
        {"model": [part.state_dict() for part in (images, texts, optimizer)], "data": source.state_dict()}, SAVED
    )
    if step == STEPS:
        break
