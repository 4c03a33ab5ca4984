"""LiT on features that are made once: a text tower learns to match an image tower that stays as it is.

python examples/lit_on_features.py FOLDER 64 256     # where to work, batch, samples to see

The recipe names a file of features. `embed --config` runs the frozen tower over the training set and writes it; then
training opens no picture. Zhai et al., "LiT", CVPR 2022, arXiv:2111.07991.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from amclr_scale.commands.main import main

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("batch", type=int)
parser.add_argument("samples", type=int)
FOLDER, BATCH, SAMPLES = vars(parser.parse_args()).values()

RECIPE = f"""
data:
  train: emoji/train                  # or shards of your own
  image_size: 32
  augmentation: {{crop_scale: [1, 1], flip: 0}}    # every epoch sees the same picture
  features: {{image: {FOLDER}/image.npy}}
model:
  image: {{name: small_resnet, width: 8, frozen: true}}    # or timm/NAME with weights: FILE; or model.init: FOLDER
  text: {{width: 32, layers: 1, heads: 2}}
  embedding_width: 32
objective: {{name: clip}}
optimizer: {{lr: 3.0e-3}}
train: {{global_batch_size: {BATCH}, samples: {SAMPLES}}}
evaluation: {{splits: [emoji/val_concept]}}         # here the tower itself encodes the pictures
run: {{folder: {FOLDER}/runs, name: lit}}
"""


def amclr(*words: str) -> None:
    if main(list(words)):
        sys.exit(f"amclr-scale {' '.join(words)} failed")


FOLDER.mkdir(parents=True, exist_ok=True)
(FOLDER / "lit.yaml").write_text(RECIPE)
amclr("embed", "--config", f"{FOLDER}/lit.yaml")
amclr("train", "--config", f"{FOLDER}/lit.yaml")
found = json.loads((FOLDER / "runs" / "lit" / "evaluation.json").read_text())
print(f"R@10, image to text: {100 * found['emoji/val_concept/image_to_text_R@10']:.1f} %")
