"""What an objective declares is read from its file alone: for the package's objectives, and for a stranger's."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from amclr_scale.checkpoint.resume import differences
from amclr_scale.config.load import build, dump, load, recipe_hash
from amclr_scale.config.objective_options import declared, option_models
from amclr_scale.declarations import Inputs
from amclr_scale.errors import UserError
from amclr_scale.study.planning.cells import base_tree, make_cells
from amclr_scale.study.planning.load import load_plan
from tests.study.test_plan import PLAN

TOY = Path(__file__).parents[1] / "objectives" / "toy.py"
WORDS = ["train.epochs=1", "data.image_views=2", "objective.name=toy"]
HEAD = """
from dataclasses import dataclass
from amclr_scale.objectives.base import Objective
class Odd(Objective, name="odd"):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        size: int = 1
    @staticmethod
    def inputs_of(options):
        return {}
"""


def stranger(folder: Path, inputs: str = "{}", head: str = HEAD) -> Path:
    file = folder / "odd.py"
    file.write_text(head.replace("return {}", f"return {inputs}"))
    return file


def refused(*words: str) -> str:
    with pytest.raises(UserError) as error:
        load(None, ["train.epochs=1", *words])
    return str(error.value)


SECTIONS = [*({"name": name} for name in option_models()), {"name": "toy", "module": str(TOY)}]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section["name"])
def test_both_readings_declare_the_same(section):
    """Once from the source, once from the class, at its defaults."""
    from amclr_scale import objectives

    objective = objectives.class_of(section)
    options = objectives.config_of(objective, {**section, "num_samples": 10})
    read = declared(section, num_samples=10)
    assert read.inputs == Inputs(objective.inputs_of(options))
    assert read.by.group_option == objective.group_option
    for B in (8, 64):
        assert read.negatives(B) == objective.negatives_of(options, B)
        assert read.equals(B) == objective.equals(options, B)
        assert read.mistakes(B, 4) == list(objective.mistakes_of(options, B, 4))


def test_options_are_inherited_in_both_readings():
    read = option_models()["xamclr_dro"].model_fields
    assert {"num_texts", "gamma", "omega", "state", "rho", "eta_epochs", "intra_weight"} <= set(read)
    softer = declared({"name": "softer", "module": str(TOY)})
    assert softer.options.temperature == 0.2
    assert softer.options.gamma == 0.8
    assert softer.inputs == {"ids": 1}


def test_equalities():
    assert declared({"name": "sogclr", "gamma": 0.9}).equals(64) is None
    assert declared({"name": "sogclr", "gamma": 1.0}).equals(64).name == "dcl"
    assert declared({"name": "clip", "group_size": 64}).equals(64).name == "clip"
    assert declared({"name": "clip", "group_size": 32}).equals(64) is None
    assert declared({"name": "clip", "group_size": 16}).negatives(64) == 15
    assert declared({"name": "vicreg"}).negatives(64) == 0
    for texts, images in ((1, 0), (1, 3), (3, 1)):  # wrong captions are keys of images, wrong pictures those of texts
        both = declared({"name": "negclip", "negatives": texts, "image_negatives": images})
        assert both.negatives(64) == 63 + 64 * max(texts, images)
    assert declared({"name": "full_bank"}, num_samples=1000).negatives(64) == 999
    assert declared({"name": "full_bank", "negatives": 50}, num_samples=1000).negatives(64) == 50


@pytest.mark.launch
def test_reading_declarations_imports_no_torch():
    code = (
        "import sys; from amclr_scale.config.load import load\n"
        f"config = load(None, {[*WORDS, f'objective.module={TOY}']!r})\n"
        "print(config.objective['prototypes'], 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["8", "False"]


def test_a_file_is_part_of_the_recipe_and_its_place_is_not(tmp_path):
    first = load(None, [*WORDS, f"objective.module={TOY}"])
    moved = tmp_path / "elsewhere.py"
    shutil.copyfile(TOY, moved)
    again = load(None, [*WORDS, f"objective.module={moved}"])
    assert recipe_hash(again) == recipe_hash(first)
    assert again.objective["module"] == str(moved)
    moved.write_text(TOY.read_text() + "\n# another file now\n")
    assert recipe_hash(load(None, [*WORDS, f"objective.module={moved}"])) != recipe_hash(first)


def test_an_edited_file_is_another_recipe_for_a_resumed_run(tmp_path):
    file = tmp_path / "mine.py"
    shutil.copyfile(TOY, file)
    saved = load(None, [*WORDS, f"objective.module={file}"]).model_dump(mode="json")
    file.write_text(TOY.read_text().replace("/ 3", "/ 4"))
    assert list(differences(saved, load(None, [*WORDS, f"objective.module={file}"]))) == ["objective.module_sha256"]
    file.unlink()
    assert differences(saved, load(None, [*WORDS, f"objective.module={TOY}"])) == {}  # the saved one need not be there


def test_a_path_may_be_one_from_the_configuration(tmp_path):
    shutil.copyfile(TOY, tmp_path / "mine.py")
    tree = {"objective": {"name": "toy", "module": "mine.py"}, "data": {"image_views": 2}, "train": {"epochs": 1}}
    (tmp_path / "a.yaml").write_text(yaml.dump(tree))
    (tmp_path / "b.yaml").write_text("base: a.yaml\nobjective: {pull: 0.5}\n")
    config = load(tmp_path / "b.yaml")
    assert config.objective["module"] == str(tmp_path / "mine.py")
    assert (config.objective["pull"], config.objective["prototypes"]) == (0.5, 8)
    (tmp_path / "c.yaml").write_text(dump(config))
    assert load(tmp_path / "c.yaml") == config
    assert "module" not in load(tmp_path / "b.yaml", ["objective.name=clip", "data.image_views=0"]).objective


BOTH = ["data.image_reference=r.npy", "data.text_reference=r.npy"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective={name: toy, module: nowhere.py}"], "objective.module: expected a Python file, got"),
        ([f"objective={{name: tpy, module: {TOY}}}"], "objective.name: no such objective 'tpy' in"),
        ([f"objective={{name: tpy, module: {TOY}}}"], "did you mean 'toy'?"),
        ([f"objective={{name: toy, module: {TOY}, prototype: 3}}"], "objective.prototype: no such key; did you mean"),
        ([f"objective={{name: toy, module: {TOY}}}"], "data.image_views: objective toy needs 2, got 0"),
        (["data.text_views=1"], "data.text_views: objective clip needs none, got 1"),
        (["data.text_reference=r.npy"], "data.text_reference: objective clip reads none, got r.npy"),
        (["objective.name=cwcl", *BOTH], "data.text_reference: objective cwcl reads none, got r.npy"),
        (["data.labels=json.concept"], "data.labels: objective clip reads none, got json.concept"),
        (
            ["data.text_view=json.paraphrase"],
            "data.text_view: data.text_views reads it, got json.paraphrase with data.text_views=0; remove it, or set",
        ),
        (
            ["data.text_augmentation.drop=0.2"],
            "data.text_augmentation: data.text_views reads it, got {'drop': 0.2} with data.text_views=0",
        ),
        (["data.image_view={flip: 0}"], "data.image_view: data.image_views reads it, got {'flip': 0.0} with data.im"),
        (["data.image_view_from=base"], "data.image_view_from: data.image_views reads it, got base with data.image_"),
        (
            ["data.text_negative=number"],
            "data.text_negative: data.text_negatives reads it, got number with data.text_neg",
        ),
        (
            ["data.image_negative=a.png"],
            "data.image_negative: data.image_negatives reads it, got a.png with data.image_",
        ),
        (["objective={name: clip, omega: -1}"], "objective.omega: clip: inputs_of: image_views: expected a number"),
    ],
)
def test_what_does_not_fit_is_told(words, said):
    assert said in refused(*words)


def test_features_of_a_teacher_need_one(tmp_path):
    file = stranger(tmp_path, "{'image_momentum': True}")
    words = ["objective.name=odd", f"objective.module={file}"]
    assert "model.momentum: objective odd reads image_momentum, which come from there, got nothing" in refused(*words)
    assert load(None, ["train.epochs=1", "model.momentum={}", *words]).model.momentum.decay == 0.995


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ("{'label': True}", "no kind of input is called 'label'; did you mean 'labels'?"),
        ("{'labels': 3}", "labels: expected True or False, got 3"),
        ("{'image_views': True}", "image_views: expected a number of them, or a tuple of names, got True"),
        ("{'image_views': ('a', 'a')}", "expected names of its own, each once"),
        ("{'image_views': ('text',)}", "expected names of its own, each once"),
        ("torch.ones(3)", "name 'torch' is not defined; declarations may use builtins, math and"),
    ],
)
def test_an_author_hears_what_inputs_of_may_say(tmp_path, inputs, said):
    assert said in refused("objective.name=odd", f"objective.module={stranger(tmp_path, inputs)}")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("class Odd(:", "odd.py, line 1: "),
        (HEAD.replace("size: int", "size: list"), "list: an objective's Config may hold int, float, bool, str"),
        (
            HEAD.replace("class Config:", "class Config(Unknown):"),
            "Config: its base Unknown is in no file that is read",
        ),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, head, said):
    assert said in refused("objective.name=odd", f"objective.module={stranger(tmp_path, head=head)}")


def test_a_folder_that_is_only_opened_runs_nothing(tmp_path):
    file = stranger(tmp_path, "open('/nowhere/at/all')")
    section = {"name": "odd", "module": str(file), "size": 3}
    config = build({"objective": section, "train": {"epochs": 1}}, trusted=False)
    assert config.objective == section
    with pytest.raises(UserError, match=r"objective\.name: odd: .*No such file"):
        build({"objective": section, "train": {"epochs": 1}})


def test_an_arm_of_a_study_may_be_a_file(tmp_path):
    tree = yaml.safe_load(PLAN) | {
        "arms": ["clip", {"name": "mine", "like": "clip", "words": ["objective.name=toy", f"objective.module={TOY}"]}],
        "axes": {"objective.prototypes": [4, 8]}, "batch_sizes": [32], "seeds": [0],
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.dump(tree))
    plan = load_plan(tmp_path / "plan.yaml")
    cells = {cell.name: cell for cell in make_cells(plan, base_tree(plan), 4938.0)}
    assert set(cells) == {"clip-B32-s0", "mine-B32-prototypes4-s0", "mine-B32-prototypes8-s0"}
    assert cells["mine-B32-prototypes4-s0"].config.data.image_views == 2  # an axis of the objective brings them along
    assert cells["mine-B32-prototypes4-s0"].negatives == 31 + 4


@pytest.mark.parametrize("name", sorted(option_models()))
def test_options_of_every_objective_are_checked_from_its_source(name):
    assert "objective.nonsense: no such key" in refused(f"objective.name={name}", "objective.nonsense=1")
    words = ["train.epochs=1", f"objective.name={name}", *provided(name)]
    config = load(None, words)
    assert set(config.objective) == {"name", *option_models()[name].model_fields}


def provided(name):
    inputs = declared({"name": name}).inputs
    views = [f"data.{key}={inputs.count(key)}" for key in ("image_views", "text_views", "text_negatives")]
    others = {"image_momentum": "model.momentum={}", "labels": "data.labels=json.concept"}
    others |= {f"{side}_reference": f"data.{side}_reference=r.npy" for side in ("image", "text")}
    return [*views, *(word for kind, word in others.items() if inputs.count(kind))]


def test_the_objectives_agree_with_what_is_read_from_their_source():
    from amclr_scale import objectives

    assert set(objectives.available()) == set(option_models())
