"""The examples of the README run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number):
    names = {}
    exec(EXAMPLES[number], names)
    image, text = (getattr(names[side], "weight", names[side]) for side in ("image", "text"))  # rows, or an encoder
    assert image.grad.abs().sum() > 0
    assert text.grad.isfinite().all()


def test_there_are_examples():
    assert len(EXAMPLES) == 3


def test_every_file_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
