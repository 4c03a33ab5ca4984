"""docs/objectives.md: its example works as printed, and its table says what the code does."""

import dataclasses
import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from amclr_scale import objectives
from amclr_scale.config.load import all_keys
from amclr_scale.config.objective_options import declared
from amclr_scale.declarations import KINDS
from amclr_scale.objectives.base import Objective
from tests.objectives.harness import B, assert_same, defined, global_batch, joined, my_rows, run

DOCS = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()


def with_example(path, fn, *args, **kwargs):
    """Call fn with the example imported as a module, as a file in the package's folder would be."""
    spec = importlib.util.spec_from_file_location("margin_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return fn(*args, **kwargs)
    finally:
        Objective.registry.pop("margin")


def definition(margin):
    def loss(state, e, step):
        logits = (e.image @ e.text.T - margin * torch.eye(B, dtype=torch.float64)) * e.logit_scale
        labels = torch.arange(B)
        value = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return value, value

    return loss


def test_the_example_is_a_complete_objective(ranks, tmp_path):
    example = re.search(r"<!-- example -->\n```python\n(.*?)```", DOCS, re.DOTALL).group(1)
    path = tmp_path / "margin.py"
    path.write_text(example)
    want = defined(definition(0.3))
    assert_same(with_example(path, run, "margin", {"margin": 0.3}, chunk=3), want)
    assert_same(joined(ranks(2, with_example, path, run, "margin", {"margin": 0.3})), want)


def test_the_example_with_parts_runs_and_says_what_it_reads(tmp_path):
    path = tmp_path / "foresight.py"
    path.write_text(re.search(r"<!-- example with parts -->\n```python\n(.*?)```", DOCS, re.DOTALL).group(1))
    section = {"name": "foresight", "module": str(path)}
    assert declared(section).inputs.count("image_views") == 2
    objective = objectives.from_section(section)
    e = my_rows(global_batch(0, views=2))
    parts = objective.model_parts(objective.config, e.image.shape[1]).double()
    made = parts({"image": e.image, "text": e.text})
    objective(dataclasses.replace(e, shared=made.pop("shared"), **made)).value.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in parts.parameters())
    assert list(parts({"image": e.image})) == ["shared"]


def test_the_table_of_inputs_is_that_of_the_code():
    """Names, and the keys that provide them, which exist."""
    keys = set(all_keys())
    table = DOCS.partition("| name | value |")[2].partition("\n\n")[0]
    shown = {}
    for line in table.splitlines()[2:]:
        names, _, meaning, by = (cell.strip() for cell in re.split(r" \| ", line.strip("| ")))
        found = re.findall(r"`(\w+)`", names) + re.findall(r"`(\w+_mask)`", meaning)
        for number, name in enumerate(found):
            provided = re.findall(r"`([\w.]+)`", by)
            shown[name] = provided[number % len(provided)] if provided else ""
            assert not shown[name] or shown[name] in keys, name
    always = {"image", "text", "text_ids", "logit_scale", "logit_bias"}
    assert shown == {name: kind.key for name, kind in KINDS.items() if name not in always}


def rows():
    """(name, version, floats per pair, MB at 3 M, GB at 400 M) of the table's stateful objectives."""
    for line in DOCS.splitlines():
        cells = [cell.strip() for cell in line.split("|")][1:-1]
        if len(cells) == 7 and "MB" in cells[4]:
            name, *versions = re.findall(r"`(\w+)`|(v\d)", cells[0])
            for version in [v for _, v in versions] or [None]:
                floats = math.prod(int(factor) for factor in cells[3].split(" x "))
                yield name[0], version, floats, float(cells[4].split()[0]), float(cells[5].split()[0])


@pytest.mark.parametrize(("name", "version", "floats", "megabytes", "gigabytes"), list(rows()))
def test_the_table_counts_the_state(name, version, floats, megabytes, gigabytes):
    options = {"version": version} if version else {}
    state = objectives.create(name, num_samples=10, **options).state_dict()
    per_pair = sum(value.numel() for value in state.values()) / 10
    assert per_pair == floats
    assert all(value.dtype == torch.float32 for value in state.values())
    assert megabytes == pytest.approx(per_pair * 4 * 3e6 / 1e6)
    assert gigabytes == pytest.approx(per_pair * 4 * 400e6 / 1e9)


def test_every_objective_has_a_row_and_a_section():
    headings = " ".join(line for line in DOCS.splitlines() if line.startswith("## "))
    for name in objectives.available():
        assert f"| `{name}`" in DOCS
        assert re.search(rf"\b{name}\b", headings)
    assert len(list(rows())) == 13
