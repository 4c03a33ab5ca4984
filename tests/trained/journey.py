"""A user's way with one text tower after another, verb by verb: `python -m tests.trained.journey FOLDER`.

FOLDER holds a `split` and, in `towers`, a folder of transformers for each kind. What each verb answered is printed as
JSON. A run's tower is taken away after it has trained: from then on the run has to do without.

One process for each tower, as DeepSpeed starts once in a process; they share the imports, and what the first `fit` has
traced of the image tower and the objective.
"""

import json
import multiprocessing
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 - with what is below: once, before processes are forked

import amclr_scale.commands.evaluate
import amclr_scale.commands.export
import amclr_scale.commands.fit
import amclr_scale.commands.train
import amclr_scale.engine.build
import amclr_scale.planner.search
import amclr_scale.trained.as_transformers  # noqa: F401
from amclr_scale.commands.main import main

WORDS = [
    "train.samples=32", "train.global_batch_size=16", "data.image_size=32", "data.context_length=12", 
    "evaluation.resamples=0", "evaluation.classes=null", "execution.threads=1", "model.embedding_width=16",
    "model.image.name=timm/test_convnext", "checkpoint.asynchronous=false",
]  # fmt: skip
FIT = ["fit", "--gpus", "8", "--device", "h100", "--batch", "64", "--memory", "1GiB", "--top", "1"]
SETTINGS = [
    "execution.zero_stage=3", "execution.recompute_image=none", "execution.recompute_text=full",
    "execution.offload=none", "execution.similarity.chunk=auto",
]  # fmt: skip
FITTED = ("bert", "qwen3", "pretrained")  # memory/test_towers.py traces a tower of every family at every stage
FORMS = ("safetensors", "transformers", "open_clip")


def travel(root: Path, kind: str, *words: str) -> dict[str, int]:
    """Exit codes by verb."""
    tower, run = root / "towers" / kind, root / "runs" / kind
    split = root / "split" / "00000.tar"
    fixed = [f"data.train={split}", f"evaluation.splits=[{split}]", f"run.folder={run.parent}", f"run.name={kind}"]
    codes = {"train": main(["train", *WORDS, *fixed, f"model.text.name=transformers/{tower}", *words])}
    if kind in FITTED:
        codes["fit"] = main([*FIT, "--config", str(run / "config.yaml"), *SETTINGS])
    shutil.rmtree(tower)
    codes["evaluate"] = main(["evaluate", str(run), "--output", str(root / "evaluated" / kind)])
    for form in FORMS:
        codes[form] = main(["export", str(run), "--to", form, "--out", str(root / form / kind)])
    return codes


if __name__ == "__main__":
    here = Path(sys.argv[1])
    kinds = [line.split() for line in (here / "towers.txt").read_text().splitlines()]
    assert main([*FIT, *WORDS, *SETTINGS, f"data.train={here / 'split' / '00000.tar'}"]) == 0
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        answers = pool.starmap(travel, [(here, *words) for words in kinds], chunksize=1)
    print(json.dumps({words[0]: answer for words, answer in zip(kinds, answers, strict=True)}))
