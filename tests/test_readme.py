"""The examples of the README run as they stand."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from amclr_scale.config.load import load

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


def through_make(words: list[str]) -> list[str]:
    """What `make quickstart` with these would give the shell to run."""
    of_a_make_around = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in of_a_make_around}
    printed = subprocess.run(
        ["make", "-n", "quickstart", *words],
        cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    last = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {printed.splitlines()[-1].partition('deepspeed ')[2]}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return last.split("\0")[:-1]


def test_keys_of_the_configuration_go_through_make_to_training():
    """make takes `resume=auto` for a variable of its own, and would begin a second run without a word."""
    given = [
        "resume=auto", "run.name=two  words", "data.weights=[1, 2]", "RANK=4", "RANKSS=4",  # slips for RANKS
        'data.train={"a b": 1, c: "x"}', "objective.module=$HOME/it's $(x) a\\b;(c)", "run.note=#1, 50%",
        "run.notes=a\tb  \t\\\tc",
    ]  # fmt: skip
    words = through_make(["RANKS=1", "PYTEST=-k resume", "WORKERS:=2", *given])
    at = words.index("--config")
    assert words[at + 1] == "configs/quickstart.yaml"
    assert sorted(words[at + 2 :]) == sorted(given)


def test_continuous_integration_gives_make_what_training_knows():
    (line,) = re.findall(r"^ *make quickstart (.*)$", (Path(__file__).parents[1] / ".ci" / "run").read_text(), re.M)
    words = through_make(shlex.split(line))
    at = words.index("--config")
    assert load(words[at + 1], words[at + 2 :]).run.folder == "runs/ci"
