"""docs/architecture.md says what the imports are, and names things that exist."""

import configparser
import re
from itertools import pairwise
from pathlib import Path

from tools.draw_architecture import imports, lay_out, purposes, reduced, with_imports

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_table_of_rooms_is_the_import_graph():
    edges = reduced(imports())
    assert set(purposes()) == set(edges)
    assert with_imports(PAGE, edges) == PAGE, (
        "python tools/draw_architecture.py writes the table, and draws the picture"
    )
    changed = edges | {"engine": {"errors"}, "errors": set()}
    assert "gradient cache, DeepSpeed, optimizers, schedules, the loop | `errors` |\n" in with_imports(PAGE, changed)


def test_rooms_are_the_layers_of_the_contract():
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    layers = contracts["importlinter:contract:one-way"]["layers"].split()
    assert {layer.removeprefix("amclr_scale.") for layer in layers} == set(purposes()) == set(imports())


def test_an_edge_that_follows_from_others_is_left_out():
    edges = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert reduced(edges) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}


def test_no_two_rooms_are_drawn_on_one_another():
    layout = lay_out(reduced(imports()))
    centres = sorted(layout.centres.values(), key=lambda centre: (centre[1], centre[0]))
    for (x, y), (next_x, next_y) in pairwise(centres):
        assert y != next_y or next_x - x > 2.6
    for room, below in ((path[0], path[-1]) for path in layout.paths):
        assert room[1] > below[1]


def test_files_that_the_page_names_exist():
    named = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]*(?:\.py)?)`", PAGE)
    assert len(named) > 20
    for name in named:
        places = [ROOT / name, ROOT / "amclr_scale" / name]
        assert any(place.exists() for place in places), name
