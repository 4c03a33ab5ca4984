"""Two pages that a reader follows from start to end: every command is run, and says what the page says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from amclr_scale.commands.make_shards import main as make_shards

ROOT = Path(__file__).parents[1]
COLOURS, SHAPES = ("red", "green", "blue", "black"), ("ellipse", "rectangle")

pytestmark = [pytest.mark.launch, pytest.mark.slow]


def photos(folder, count):
    """Pictures of coloured shapes, each with a text beside it."""
    folder.mkdir()
    for n in range(count):
        colour, shape = COLOURS[n % 4], SHAPES[n // 4 % 2]
        image = Image.new("RGB", (40, 36), (255, 255, 255 - n))
        getattr(ImageDraw.Draw(image), shape)((6, 6, 30, 28), fill=colour)
        image.save(folder / f"{n}.jpg")
        word = {"ellipse": "circle", "rectangle": "square"}[shape]
        (folder / f"{n}.txt").write_text(f"a {colour} {word}\n")
    return folder


PAGES = {"own_photos.md": 8, "large_runs.md": 8}  # and how much there is to run


def test_pages_do_what_they_say(tmp_path):
    words = []
    for page in PAGES:
        here = tmp_path / page.removesuffix(".md")
        here.mkdir()
        photos(here / "held_out", 8)
        photos(here / "photos", 48)
        words += [str(ROOT / "docs" / page), str(here)]
    for name in ("shards", "more_shards"):
        assert make_shards(["folder", "--images", str(here / "photos"), "--out", str(here / name)]) == 0
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "WANDB_SILENT": "true"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.walkthrough", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "large_runs" / "runs" / "first"  # what it sends to trackers is there, too
    assert Image.open(run / "sheet_held_out.png").size[0] > 600
    assert list((run / "tensorboard").iterdir())
    assert [line for line in done.stdout.splitlines() if line.endswith(" done")] == [
        f"{n} done" for n in PAGES.values()
    ]
