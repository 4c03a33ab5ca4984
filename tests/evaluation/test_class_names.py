"""A class gets the name that is its own, by whatever the list says whose a name is; or the list is refused."""

import json
import re

import pytest
import torch

from amclr_scale.commands.evaluate import main
from amclr_scale.errors import UserError
from amclr_scale.evaluation.class_names import name_classes
from amclr_scale.evaluation.run import Evaluator
from tests.evaluation.shards import picture
from tests.evaluation.test_models import write_run
from tests.evaluation.test_run import model, recipe


def pairs(found) -> list[str]:
    """The name that each sample's class has."""
    return [found.names[place] for place in found.labels.tolist()]


@pytest.fixture
def named(tmp_path):
    def write(labels, lines, own=None):
        (tmp_path / "names.txt").write_text("\n".join(lines))
        return name_classes("photos", labels, own, str(tmp_path / "names.txt"))

    return write


def sorted_words(labels) -> list[str]:
    return sorted(set(labels))


def test_names_wherever_they_stand(named):
    """Sorted folders are goldfish, tench, zebra: their places are not those of the list."""
    folders = ["goldfish", "tench", "Great_white Shark"]
    found = named(folders, ["tench", "goldfish", "zebra", "great white shark"], sorted_words(folders))
    assert pairs(found) == ["goldfish", "tench", "great white shark"]
    assert found.rule == "by name"


@pytest.mark.parametrize("style", ["{}", "{:03d}"])
def test_numbers_are_positions(named, style):
    """Sorted as words, 10 and 11 come before 2."""
    folders = [style.format(n) for n in range(12)]
    found = named(folders, [f"name_of_{n}" for n in range(12)], sorted_words(folders))
    assert pairs(found) == [f"name of {n}" for n in range(12)]
    assert found.rule == "by number"


@pytest.mark.parametrize("between", ["\t", " ", "   "])
def test_pairs_say_it(named, between):
    lines = [f"n2{between}a zebra", f"n0{between}tench, Tinca tinca", f"n1{between}great_white"]
    found = named(["n0", "n1", "n2", "n0"], lines, ["n0", "n1", "n2"])
    assert pairs(found) == ["tench, Tinca tinca", "great white", "a zebra", "tench, Tinca tinca"]
    assert found.names[0] == "a zebra"


def test_imagenet_by_wordnet_numbers():
    """Also a part of them, in any order; the names are OpenAI's."""
    folders = ["n02123045", "n01440764", "n15075141"]  # a tabby cat, the first one and the last one
    found = name_classes("imagenet", folders, sorted_words(folders), "imagenet")
    assert pairs(found) == ["tabby cat", "tench", "toilet paper"]
    assert found.labels.tolist() == [281, 0, 999]
    with pytest.raises(UserError, match="got n00000001, which is none of ImageNet-1k's"):
        name_classes("imagenet", ["n01440764", "n00000001"], None, "imagenet")


def test_numbered_classes_of_a_data_set_that_has_names(named):
    """The same names in another order are found by name, translations in the order of the numbers."""
    own = ["red", "green", "blue"]
    assert pairs(named([0, 1, 2], ["blue", "red", "green"], own)) == own
    assert pairs(named([0, 1, 2], ["rouge", "vert", "bleu"], own)) == ["rouge", "vert", "bleu"]
    assert pairs(named([0, 2], ["rouge", "vert", "bleu"])) == ["rouge", "bleu"]
    with pytest.raises(UserError, match=r"^evaluation.class_names: photos has 3 classes, .*names.txt 4"):
        named([0, 1, 2], ["rouge", "vert", "bleu", "noir"], own)


@pytest.mark.parametrize(
    ("labels", "lines", "why"),
    [
        (["blue", "green"], ["bleu", "vert"], "got 'blue', which is not among the names"),
        (["crane", "dog"], ["crane", "dog", "crane"], "got 'crane', which stands there, twice"),
        (["1", "2", "3"], ["a", "b", "c"], "got numbers up to 3, and a list of 3 names has the numbers 0 to 2"),
        ([0, 7], ["a", "b", "c"], "got numbers up to 7"),
        (["n01440764"], ["tench"], "got 'n01440764', which is not among the names"),
    ],
)
def test_a_list_that_does_not_say_whose_its_names_are(named, labels, lines, why):
    with pytest.raises(UserError, match=rf"^evaluation.class_names: photos: expected names that .*{re.escape(why)}"):
        named(labels, lines)


def test_own_names():
    found = name_classes("photos", ["ice_cream", "dog", "ice_cream"], ["dog", "ice_cream"], None)
    assert (found.names, found.labels.tolist(), found.rule) == (["dog", "ice cream"], [1, 0, 1], "")
    assert name_classes("photos", [3, 1], ["a", "b", "c", "d"], None).labels.tolist() == [3, 1]
    assert name_classes("photos", [3, 1], None, None) is None
    with pytest.raises(UserError, match=r"^evaluation.classes: photos: sample 1 has the class 4"):
        name_classes("photos", [0, 4], ["a", "b"], None)


def test_first_prompts_are_told_where_numbers_are(tmp_path, capsys):
    folder = tmp_path / "photos"
    for number in range(3):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "0.png").write_bytes(picture(number))
    (tmp_path / "names.txt").write_text("tench\nsea_horse\nzebra\ndog\n")
    config = recipe(str(folder), class_names=str(tmp_path / "names.txt"), templates=["a {}", "the {}"], resamples=0)
    told = "photos: 4 classes (1 without images), named by number, each in 2 prompts: a tench | a sea horse | a zebra"
    assert Evaluator(config).prompts() == [told]
    torch.manual_seed(0)
    write_run(tmp_path / "run", model(config), config)
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert told in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["prompts"] == [told]
    assert f"- {told}" in (tmp_path / "out" / "results.md").read_text()
