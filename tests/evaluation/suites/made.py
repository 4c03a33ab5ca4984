"""Small data sets in the layouts of their benchmarks, and a model that maps what it is given to fixed directions."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from amclr_scale.config.schema import Config
from amclr_scale.evaluation.suites.catalogue import SUITES
from amclr_scale.evaluation.suites.opened import Place
from tests.evaluation.shards import picture, write_tar
from tests.evaluation.test_run import recipe

NAMES = ["cat", "dog", "green bird", "fish", "red_fox", "cow", "ant"]
TEMPLATES = ["a photo of a {c}.", "{c}"]
WIDTH = 12


class Directions:
    """Called like a model: every picture and every text has a direction of its own, float64."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.pixels = torch.randn(3 * 16 * 16, WIDTH, generator=self.generator, dtype=torch.float64)

    def __call__(self, images: Sequence[torch.Tensor] = (), texts: Sequence[torch.Tensor] = (), **_: Any) -> Any:
        out = {}
        if images:
            flat = images[0].double().flatten(1)
            out["image"] = F.normalize((flat - flat.mean(1, keepdim=True)) @ self.pixels, dim=-1)
        if texts:
            rows = [torch.Generator().manual_seed(hash(tuple(row.tolist())) % 2**31) for row in texts[0]]
            drawn = [torch.randn(WIDTH, generator=one, dtype=torch.float64) for one in rows]
            out["text"] = F.normalize(torch.stack(drawn), dim=-1)
        return out


def place(suite: str, name: str, path: Path, root: Path, config: Config | None = None) -> Place:
    """A data set as its reader gets it."""
    config = config or Config.model_validate({**recipe().model_dump(), "evaluation": {"resamples": 0, "batch_size": 4}})
    return Place(SUITES[suite].find(name), path, root, config.data, config.evaluation, None, 0, 1)


def classes_folder(
    folder: Path, labels: Sequence[int], names: Sequence[str] = NAMES, *, metadata: Sequence[Sequence[int]] = (),
    shards: int = 2, seed: int = 0,
) -> Path:  # fmt: skip
    """FOLDER/test/{0..}.tar with .png, .cls and perhaps .npy, nshards.txt, class names, templates."""
    (folder / "test").mkdir(parents=True)
    samples: list[dict[str, Any]] = [
        {"png": picture(1000 * seed + number), "cls": str(label)} for number, label in enumerate(labels)
    ]
    for sample, values in zip(samples, metadata, strict=False):
        buffer = io.BytesIO()
        np.save(buffer, np.array(values))
        sample["npy"] = buffer.getvalue()
    size = -(-len(samples) // shards)
    for shard in range(shards):
        write_tar(folder / "test" / f"{shard}.tar", samples[shard * size : (shard + 1) * size])
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return folder


def retrieval_folder(folder: Path, n: int = 6, captions: int = 2) -> Path:
    """FOLDER/test/0.tar with .png and .txt, a caption a line, and dataset_type.txt."""
    (folder / "test").mkdir(parents=True)
    samples = [
        {"png": picture(500 + i), "txt": "\n".join(f"thing {i} told {k} times" for k in range(captions))}
        for i in range(n)
    ]
    write_tar(folder / "test" / "0.tar", samples)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("retrieval")
    return folder


def pictures(folder: Path, names: Sequence[str], size: int = 16) -> Path:
    """Picture files, each another."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(100 + number, size))
    return folder


def winogavil(folder: Path, instances: Sequence[tuple[str, Sequence[str], Sequence[str]]]) -> Path:
    """FOLDER/winogavil_dataset.csv of (cue, candidates, associations), and images/CANDIDATE.jpg."""
    pictures(folder / "images", sorted({f"{name}.jpg" for _, names, _ in instances for name in names}))
    with (folder / "winogavil_dataset.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["", "candidates", "cue", "associations", "num_candidates"])
        for number, (cue, names, right) in enumerate(instances):
            rows.writerow([number, json.dumps(list(names)), cue, json.dumps(list(right)), len(names)])
    return folder / "winogavil_dataset.csv"
