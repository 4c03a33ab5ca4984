"""The losses need torch and nothing else; a command says which extra brings what it lacks."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CALLED = {"pyyaml": "yaml", "pillow": "PIL", "open_clip_torch": "open_clip", "resvg-py": "resvg_py"}  # else as they are

pytestmark = pytest.mark.launch  # each starts a Python of its own
BLOCK = """
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in set(sys.argv[1].split(","))
        return None if absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""
LOSSES = (
    BLOCK
    + """
import torch
import torch.nn.functional as F
from amclr_scale import GradientCache, objectives
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings

image, text = (F.normalize(torch.randn(8, 4), dim=1).requires_grad_() for _ in range(2))
contrast(image, text, temperature=0.1).image.log_sum.sum().backward()
for name in ("clip", "siglip", "sogclr", "isogclr", "amclr_dro"):
    objective = objectives.create(name, num_samples=8)
    views = {"image_views": (image,), "text_views": (text,)} if name.startswith("amclr") else {}
    scale = torch.ones(1) if name in ("clip", "siglip") else None
    bias = {"logit_bias": torch.zeros(1)} if name == "siglip" else {}
    given = Embeddings(image=image, text=text, ids=torch.arange(8), logit_scale=scale, **bias, **views)
    objective(given).value.backward()
assert len(objectives.available()) > 30
GradientCache(torch.nn.Linear(4, 2), 3)(lambda out: out.square().sum(), image.detach())
assert image.grad.isfinite().all() and image.grad.abs().sum() > 0
"""
)
COMMANDS = (
    BLOCK
    + """
from amclr_scale.commands.main import main
sys.exit(main(sys.argv[2:]))
"""
)


def packages(extra):
    """The names to import of an extra's packages, and of those that it names in turn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = set()
    for line in project["optional-dependencies"][extra]:
        name = line.replace(">", "[").partition("[")
        if name[0] == "amclr_scale":
            found |= set.union(*(packages(one) for one in line.partition("[")[2].rstrip("]").split(",")))
        else:
            found.add(CALLED.get(name[0], name[0].replace("-", "_")))
    return found


def python(code, absent, *words):
    command = [sys.executable, "-c", code, ",".join(sorted(absent)), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_the_losses_need_torch_alone():
    every = packages("dev") | packages("gpu") | {"braceexpand", "deepspeed"}
    assert {"deepspeed", "transformers", "webdataset", "pyarrow", "PIL", "pydantic", "yaml", "numpy"} <= every
    done = python(LOSSES, every)
    assert done.returncode == 0, done.stderr[-3000:]


def test_shards_are_made_without_what_trains(tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 40), (9, 9, 200)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a square")
    words = ["shards", "make", "folder", "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    done = python(COMMANDS, packages("train") - packages("data"), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "read 1, wrote 1 samples" in done.stdout


def test_a_command_says_what_it_lacks():
    for absent, words, extra in (("pydantic", ["train", "--help"], "train"), ("PIL", ["shards", "make"], "data")):
        done = python(COMMANDS, {absent}, *words)
        assert done.returncode == 2
        verb = "train" if extra == "train" else "shards make"
        told = f"amclr-scale {verb} needs {absent}, which is not installed: pip install 'amclr_scale[{extra}]'\n"
        assert done.stderr.endswith(told), done.stderr[-2000:]


def test_the_extras_are_those_that_the_command_knows():
    from amclr_scale.commands.main import OF_DATA, PACKAGES

    assert set(OF_DATA) == packages("data") | {"braceexpand"}  # which webdataset brings
    assert set(PACKAGES) == packages("train") | {"braceexpand"}
