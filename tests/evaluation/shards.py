"""Small data sets on disk for tests: drawn pictures, captions, classes."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "black", "white")


def picture(seed: int, size: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict[str, Any]]) -> None:
    """Samples are `member extension -> bytes or str or something for JSON`."""
    with tarfile.open(path, "w") as tar:
        for index, sample in enumerate(samples):
            for extension, content in sample.items():
                text = json.dumps(content) if extension == "json" else content
                raw = text.encode() if isinstance(text, str) else text
                header = tarfile.TarInfo(f"{index:06d}.{extension}")
                header.size = len(raw)
                tar.addfile(header, io.BytesIO(raw))


def write_split(folder: Path, n: int, *, captions: int = 1, copies: int = 0, shared_images: int = 0) -> Path:
    """One shard of n samples with names of classes; the first `copies` captions are the same text.

    The last `shared_images` samples show the picture of sample 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(n):
        image = 0 if i >= n - shared_images else i
        name = COLOURS[i % len(COLOURS)]
        lines = [f"picture {'same' if i < copies else i} line {k} {name}" for k in range(captions)]
        if i < copies:
            lines = [f"the same caption {k}" for k in range(captions)]
        samples.append({"png": picture(image), "txt": "\n".join(lines), "json": {"concept": name, "image_id": image}})
    write_tar(folder / "00000.tar", samples)
    return folder / "00000.tar"
