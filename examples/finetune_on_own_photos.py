"""Fine-tune a CLIP of transformers on one's own photos, and say what that changed on photos that were held out.

python examples/finetune_on_own_photos.py PHOTOS HELD_OUT CLIP FOLDER key=value ...

PHOTOS and HELD_OUT have a .txt of captions beside each picture. CLIP is a local folder, for instance from
`hf download openai/clip-vit-base-patch32 --local-dir CLIP`. FOLDER takes the shards, the run and the results; the words
change keys of the recipe.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from amclr_scale.commands.main import main

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("photos")
parser.add_argument("held_out")
parser.add_argument("clip")
parser.add_argument("folder")
parser.add_argument("words", nargs="*", metavar="key=value")
PHOTOS, HELD_OUT, CLIP, FOLDER, WORDS = vars(parser.parse_args()).values()
SPLITS = f"evaluation.splits={{held_out: {HELD_OUT}}}"
RECIPE = f"""
data: {{train: {FOLDER}/shards, augmentation: {{crop_scale: [0.9, 1.0]}}}}
model: {{init: {CLIP}, image: {{frozen: true, unfrozen_blocks: 1}}}}    # the towers, tokenizer and sizes are CLIP's
optimizer: {{lr: 1.0e-4, weight_decay: 0.1}}
train: {{global_batch_size: 16, epochs: 3}}
evaluation: {{splits: {{held_out: {HELD_OUT}}}}}
run: {{folder: {FOLDER}/runs, name: tuned}}
"""


def amclr(*words: str) -> None:
    if main(list(words)):
        sys.exit(f"amclr-scale {' '.join(words)} failed")


amclr("shards", "make", "folder", "--images", PHOTOS, "--out", f"{FOLDER}/shards")
Path(FOLDER, "tune.yaml").write_text(RECIPE)
amclr("train", "--config", f"{FOLDER}/tune.yaml", *WORDS)
amclr("evaluate", f"transformers/{CLIP}", f"{FOLDER}/runs/tuned", "--set", SPLITS, "--output", f"{FOLDER}/compared")
found = json.loads(Path(FOLDER, "compared", "results.json").read_text())["results"].values()
before, after = (100 * numbers["held_out/text_to_image_R@1"] for numbers in found)
print(f"R@1, text to image: {before:.1f} % before, {after:.1f} % after")
