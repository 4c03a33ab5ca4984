"""A configuration is right, or every mistake in it is told at once, the key first, without torch."""

import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from amclr_scale.config.help import describe
from amclr_scale.config.load import all_keys, build, dump, load, recipe, recipe_hash
from amclr_scale.config.optimizers import RULES
from amclr_scale.config.section import Fraction, Section, section_of
from amclr_scale.errors import UserError


def refused(*words, path=None, world_size=1):
    with pytest.raises(UserError) as caught:
        load(path, words, world_size)
    return str(caught.value)


def test_every_mistake_is_told_at_once():
    lines = refused(
        "train.global_batchsize=32768", "train.samples=1.5", "optimizer.name=adamwx", "optimizer.lr=fast",
        "execution.zero_stag=3", "objective.name=sogcrl", "optimizr.lr=3", "execution.similarity.chunk=many",
    ).splitlines()  # fmt: skip
    told = {line.partition(":")[0]: line for line in lines}
    assert len(lines) == len(told) == 8
    assert told["train.global_batchsize"].endswith("no such key; did you mean 'global_batch_size'?")
    assert "did you mean 'zero_stage'" in told["execution.zero_stag"]
    assert "did you mean 'optimizer'" in told["optimizr"]
    assert "did you mean 'sogclr'" in told["objective.name"]
    assert told["optimizer.name"].endswith("got 'adamwx'; did you mean 'adamw'?")
    assert told["optimizer.lr"].endswith("got 'fast'")
    assert "or expected 'auto', got 'many'" in told["execution.similarity.chunk"]
    assert "1.5" in told["train.samples"]


class Own(Section):
    rho: Fraction = 0.3


def test_an_optimizers_own_options(monkeypatch):
    """Filled in, checked, part of the recipe, and gone with the optimizer's name."""
    assert load(None, ["train.epochs=1"]).optimizer.options == {}
    assert "adamw has no options" in refused("train.epochs=1", "optimizer.options.rho=0.2")
    monkeypatch.setitem(RULES, "toy", replace(RULES["sgd"], options=Own, stages=(0, 1), offloadable=False))
    words = ["train.epochs=1", "optimizer.name=toy"]
    first, second = load(None, words), load(None, [*words, "optimizer.options.rho=0.2"])
    assert first.optimizer.options == {"rho": 0.3}
    assert second.optimizer.options == {"rho": 0.2}
    assert recipe_hash(first) != recipe_hash(second)
    assert build(yaml.safe_load(dump(second))) == second
    assert refused(*words, "optimizer.options.rho=2").startswith("optimizer.options.rho: ")
    assert "optimizer.options.rh: no such key; did you mean 'rho'?" in refused(*words, "optimizer.options.rh=0.2")
    assert refused(*words, "execution.zero_stage=2").startswith("execution.zero_stage: expected 0 or 1 with ")
    assert load(None, [*words, "optimizer.options.rho=0.2", "optimizer.name=lamb"]).optimizer.options == {}


def test_a_key_in_the_wrong_section_is_found():
    assert "did you mean optimizer.lr?" in refused("train.epochs=1", "train.lr=1")
    assert "optimizer.leanring_rate: no such key; known: name, lr, " in refused(
        "train.epochs=1", "optimizer.leanring_rate=1"
    )
    assert "did you mean data.augmentation?" in refused("train.epochs=1", "augmentation={flip: 0.5}")


def test_options_of_one_objective_do_not_outlive_a_change_of_name(tmp_path):
    (tmp_path / "base.yaml").write_text("objective: {name: sogclr, gamma: 0.5}\ntrain: {epochs: 1}\n")
    (tmp_path / "a.yaml").write_text("base: base.yaml\nobjective: {name: clip}\n")
    assert "gamma" not in load(tmp_path / "a.yaml").objective
    assert load(tmp_path / "base.yaml", ["objective.gamma=0.25"]).objective["gamma"] == 0.25


def test_another_name_elsewhere_changes_nothing_else(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "train: {epochs: 1}\nrun: {name: a, folder: /data/runs, wandb: offline}\n"
        "optimizer: {name: adamw, lr: 0.5, weight_decay: 0.3, warmup_samples: 64}\n"
        "model: {image: {name: small_resnet, norm: group, dropout: 0.1}}\n"
    )
    words = ["run.name=b", "optimizer.name=lamb", "model.image.name=timm/resnet18"]
    before, after = load(tmp_path / "a.yaml"), load(tmp_path / "a.yaml", words)
    assert after.run == before.run.model_copy(update={"name": "b"})
    assert after.optimizer == before.optimizer.model_copy(update={"name": "lamb"})
    assert after.model.image == before.model.image.model_copy(update={"name": "timm/resnet18"})


def test_samples_and_epochs_exclude_one_another_and_the_last_word_counts(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {epochs: 3}\n")
    config = load(tmp_path / "a.yaml", ["train.samples=4096"])
    assert (config.train.samples, config.train.epochs) == (4096, None)
    assert "train.samples: expected exactly one" in refused()
    (tmp_path / "b.yaml").write_text("train: {epochs: 3, samples: 4096}\n")
    assert "train.samples: expected exactly one" in refused(path=tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 1}\ntrain: {epochs: 2}", "train: given twice"),
        ("train: [1", "not readable as YAML"),
        ("- 1\n- 2", "expected sections with keys, got list"),
        ("base: nowhere.yaml", "which does not exist"),
        ("base: a.yaml", "names itself"),
        ("base: [b.yaml]", "base: expected the path of a YAML file"),
        ("run: {name: caf\u00e9}", "expected YAML in UTF-8"),
        ("data:\n\timage_size: 8", "cannot start any token at line 2, column 1: image_size: 8"),
    ],
)
def test_broken_files(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text, "latin-1")
    assert message in refused(path=tmp_path / "a.yaml")


def test_what_is_no_file_is_not_said_to_be_missing(tmp_path):
    assert refused(path=tmp_path).endswith("which is no file")


def test_a_base_is_a_path_from_its_file_or_a_shipped_name(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("base: objectives/sogclr\ntrain: {epochs: 3}\n")
    assert load(tmp_path / "a.yaml").objective["name"] == "sogclr"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.yaml").write_text("train: {epochs: 2}\n")
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    monkeypatch.chdir(tmp_path / "elsewhere")  # where a command is run is no matter
    assert f"got {tmp_path / 'b.yaml'}, which does not exist" in refused(path=tmp_path / "a.yaml")


def test_a_missing_file_and_a_word_without_a_value():
    assert "--config: expected a YAML file or the name of a shipped one, got nowhere.yaml" in refused(
        path="nowhere.yaml"
    )
    assert "train.epochs: expected key=value" in refused("train.epochs")
    assert refused("configs/a.yaml").endswith("; a file is named by --config configs/a.yaml")
    assert """run.name='"...\"'""" in refused("train.epochs=1", "run.name=20261122")
    assert load(None, ["train.epochs=1", "run.name='20261122'"]).run.name == "20261122"
    assert "data.train: not readable as YAML" in (said := refused("train.epochs=1", "data.train={00..31}.tar"))
    assert said.endswith("; put text in quotes, inside the shell's own")


def test_ranks_lanes_and_batch_must_fit():
    assert "data.lanes: expected a multiple of the number of ranks, got 8 lanes for 3 ranks" in refused(
        "train.epochs=1", world_size=3
    )
    assert "the nearest is 104" in refused("train.epochs=1", "train.global_batch_size=101")
    assert "at least one global batch (128), got 100" in refused("train.samples=100")


def test_deepspeed_may_not_be_told_what_is_generated():
    said = refused("train.epochs=1", "deepspeed={zero_optimization: {stage: 2}, gradient_clipping: 3}")
    assert "deepspeed.zero_optimization.stage: this is generated from execution.zero_stage" in said
    assert "deepspeed.gradient_clipping: this is generated from optimizer.max_grad_norm" in said
    config = load(None, ["train.epochs=1", "deepspeed.zero_optimization.overlap_comm=true"])
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}}


def test_a_dump_reads_back_to_the_same_configuration(tmp_path):
    config = load("configs/quickstart.yaml", ["objective.name=sogclr", "run.wandb=offline"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", ["1e5", "off", "010", "0o7", "1:30", "2026-11-22", "12_3", "~", "=", "0x1f", ".nan"])
def test_a_dumped_word_stays_one_for_every_reader(tmp_path, name):
    text = dump(load(None, ["train.epochs=1", f"run.name='{name}'"]))
    (tmp_path / "config.yaml").write_text(text)
    assert load(tmp_path / "config.yaml").run.name == yaml.safe_load(text)["run"]["name"] == name


def test_the_recipe_hash_changes_with_what_and_not_with_how():
    config = load(None, ["train.epochs=1"])
    assert recipe_hash(
        load(None, ["train.epochs=1", "execution.zero_stage=1", "run.name=x", "data.cache=/y"])
    ) == recipe_hash(config)
    assert recipe_hash(load(None, ["train.epochs=1", "optimizer.lr=0.5"])) != recipe_hash(config)
    assert recipe_hash(load(None, ["train.epochs=1", "objective.name=dcl"])) != recipe_hash(config)


def test_a_teacher_belongs_to_the_recipe_and_its_absence_to_every_older_one():
    without, one, other = (
        load(None, ["train.epochs=1", *words]) for words in ([], ["model.momentum={}"], ["model.momentum={decay: 0.9}"])
    )
    assert "model.momentum" not in recipe(without)
    assert len({recipe_hash(config) for config in (without, one, other)}) == 3


def test_every_key_is_documented():
    def missing(model, prefix=""):
        for name, field in model.model_fields.items():
            if (inner := section_of(field.annotation)) is not None:
                yield from missing(inner, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    from amclr_scale.config.schema import Config

    assert list(missing(Config)) == []


@pytest.mark.launch
def test_no_torch_is_needed_to_check_a_configuration():
    code = (
        "import sys\nfrom amclr_scale.config.load import load\nfrom amclr_scale.config.help import describe\n"
        "load('configs/quickstart.yaml'); describe(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"False\n"


def test_building_from_a_tree_checks_it_too():
    with pytest.raises(UserError, match=r"objective\.name: this key is needed"):
        build({"objective": {}, "train": {"epochs": 1}})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["execution.precision=bf16"], "execution.zero_stage: expected 1 or more"),
        (["execution.offload=optimizer"], "execution.offload: optimizer states move to the host at zero_stage 1"),
        (["execution.offload=parameters", "execution.zero_stage=2"], "at zero_stage 3 only, got 2"),
        (["execution.offload=optimizer", "execution.zero_stage=1", "optimizer.name=lion"], "got lion"),
        (["model.image.norm=sync", "execution.micro_batch_size=8"], "expected this rank's whole share of 128, got 8"),
        (["evaluation.suites=[aro]"], "evaluation.suites: expected names with values, got ['aro']; such as evaluation"),
        (["optimizer=lion"], "optimizer: expected names with values, got 'lion'; did you mean optimizer.name=lion?"),
        (["optimizer.schedule=step"], "optimizer.step_samples: schedule step needs"),
        (["objective.name=amclr"], "data.image_views: objective amclr needs 1, got 0"),
        (["optimizer.lr=.inf"], "optimizer.lr: expected finite numbers, got inf"),
        (["model.image.dropout=0", "data.image_mean=[0, .nan, 0]"], "data.image_mean: expected finite numbers"),
        (["optimizer.betas=[0.9, 1]"], "optimizer.betas: expected two numbers below 1, got [0.9, 1.0]"),
        (["data.augmentation.crop_scale=[0.9, 0.5]"], "data.augmentation.crop_scale: expected the smallest, then"),
        (["data.image_view={crop_ratio: [2, 1]}"], "data.image_view.crop_ratio: expected the smallest, then"),
        (
            [
                "objective.name=amclr",
                "data.text_views=1",
                "data.image_views=1",
                "data.image_view_from=base",
                "data.image_view={crop_scale: [1, 1], flip: 0}",
            ],
            "data.image_view: expected an augmentation that draws something",
        ),
        (
            [
                "objective.name=amclr",
                "data.text_views=1",
                "data.image_views=1",
                "data.augmentation={crop_scale: [1, 1], flip: 1}",
            ],
            "further views would equal the base view",
        ),
        (
            [
                "objective={name: amclr, omega: 2}",
                "data.text_views=2",
                "data.image_views=2",
                "data.image_view={crop_scale: [1, 1], flip: 0, randaugment: [0, 9]}",
            ],
            "further views would equal one another",
        ),
        (["data.augmentation.randaugment=[2, 31]"], "data.augmentation.randaugment: expected [operations, magnitude]"),
        (["data.augmentation.color_jitter=-1"], "data.augmentation.color_jitter: expected 0 (none) or more, got -1.0"),
        (["model.momentum={decay: 1.5}"], "model.momentum.decay: expected less than or equal to 1, got 1.5"),
        (["evaluation.momentum=true"], "model.momentum: evaluation.momentum measures it, got null"),
        (["model.momentum={decay: 1}"], "model.momentum.decay: expected less than 1, where the average never moves"),
        (["model.momentum={decays: 1}"], "model.momentum.decays: no such key; did you mean 'decay'?"),
        (["model.momentum={decay_schedule: cosine}"], "model.momentum.start_decay: decay_schedule cosine begins there"),
        (["model.momentum={start_decay: 0.5}"], "model.momentum.start_decay: decay_schedule cosine reads it, got 0.5"),
        (["evaluation.splits=emoji/val_style"], "put it in brackets: evaluation.splits=[emoji/val_style]"),
    ],
)
def test_what_would_train_wrongly_is_refused(words, said):
    assert said in refused("train.epochs=1", *words)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (f"seed={10**22}", f"seed: expected less than or equal to {10**12}, got {10**22}"),
        ("data.image_size=100000", "data.image_size: expected less than or equal to 16384, got 100000"),
        ("data.train=", "or expected names with values, got null; such as data.train={NAME: VALUE}"),
        ("evaluation.splits={}", "evaluation.splits: expected a valid list, or expected at least 1 item, got {}"),
        ("resume_changed=true", "resume_changed: expected text, got true; put it in quotes"),
        ("seed=true", "seed: expected a value that is not true or false, got true"),
        ("optimizer.max_grad_norm=false", "optimizer.max_grad_norm: expected a value that is not true or false"),
        ("objective={name: clip, temperature: true}", "objective.temperature: expected a value that is not true"),
        ("run.diagnostics=maybe", "run.diagnostics: expected true or false, got 'maybe'"),
        ("objective.temperature=0.1", "objective.name: this key is needed beside objective.temperature"),
    ],
)
def test_true_is_no_number(word, said):
    assert said in refused("train.epochs=1", word)


def test_a_key_that_may_be_true_takes_it():
    config = load(None, ["train.epochs=1", "objective={name: fastclip, compat: true}", "execution.compile=true"])
    assert config.execution.compile is True
    assert config.objective["compat"] is True


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("optimizer.name=adam", "got 'adam'; did you mean 'adamw'?"),  # radam is as near by its letters
        (
            "execution.precision=bf61",
            "expected 'fp32', 'tf32', 'amp_bf16', 'bf16' or 'fp16', got 'bf61'; did you mean 'bf16'?",
        ),
        ("model.image.norm=grup", "got 'grup'; did you mean 'group'?"),
        ("objective.name=sogclr2", "objective.name: no such objective 'sogclr2'; did you mean 'sogclr'?"),
        ("execution.offload=cpu", "execution.offload: expected 'none', 'optimizer' or 'parameters', got 'cpu'"),
        ("data.stream=ja", "data.stream: expected true or false, got 'ja'"),  # a key that begins like a type
    ],
)
def test_near_misses_get_a_suggestion(word, line):
    with pytest.raises(UserError) as caught:
        load(None, [word, "train.epochs=1"])
    assert str(caught.value).endswith(line)


def test_help_lists_default_and_allowed_values_of_every_key():
    said = describe()
    for key in all_keys():
        (line,) = [one for one in said.splitlines() if one.startswith(f"  {key} = ")]
        assert line.endswith(")"), line
        assert "anything" not in line, line
    for line in (
        "execution.precision = fp32  (fp32, tf32, amp_bf16, bf16 or fp16)",
        "execution.zero_stage = 0  (0, 1, 2 or 3)",
        "evaluation.splits = []  (a list: text, or a mapping)",
        "data.augmentation.crop_scale = [0.6, 1.0]  (a list: 2 values, each number at least 0 and at most 1)",
        "data.weights = null  (a list: number above 0, or null)",
        "optimizer.step_samples = []  (a list: whole number above 0)",
        "data.stream = false  (true or false)",
    ):
        assert f"  {line}\n" in said


@pytest.mark.launch
def test_without_docstrings_and_assertions_mistakes_and_help_are_the_same():
    """python -OO: explanations of keys are read from the source."""
    code = (
        "from amclr_scale.config.help import describe\nfrom amclr_scale.config.load import load\n"
        "from amclr_scale.commands.train import arguments\nassert False\narguments([])\n"
        "load('configs/quickstart.yaml')\nprint('Of everything random' in describe())\n"
    )
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
