"""What is called the largest batch fits and the next one does not; choices fit, in order of time, and say why."""

import json
import os
from functools import cache

import pytest

from amclr_scale.config.load import build, dump, load
from amclr_scale.config.schema import Config
from amclr_scale.distributed.process_group import device_type
from amclr_scale.errors import UserError
from amclr_scale.memory.units import in_words
from amclr_scale.metrics.devices import find_profile
from amclr_scale.planner.auto_execution import given
from amclr_scale.planner.search import Fit
from amclr_scale.planner.settings import changed, largest_number, settings_of, with_batch

MIB = 2**20
H100 = find_profile("h100")


def small(**execution: object) -> Config:
    """A recipe whose towers are traced in a moment."""
    tree = {
        "data": {"image_size": 16, "context_length": 8},
        "model": {"embedding_width": 32, "image": {"width": 8}, "text": {"width": 32, "layers": 2, "heads": 2}},
        "train": {"epochs": 1},
        "execution": execution,
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 100_000}},
    }
    return build(tree, 1)


def fit_of(memory: int, world_size: int = 2, fixed: tuple[str, ...] = (), **execution: object) -> Fit:
    return Fit(
        small(**execution),
        H100,
        world_size=world_size,
        num_samples=10_000,
        memory=memory,
        ranks_per_node=8,
        fixed=fixed,
    )


@cache
def largest_in(mib: int, world_size: int = 2) -> int:
    return fit_of(mib * MIB, world_size=world_size).largest()


def test_the_largest_number_that_fits_is_found_by_bisection():
    for limit in (1, 2, 7, 64, 100):
        assert largest_number(lambda n, limit=limit: n <= limit, 1, 100) == limit


@pytest.mark.slow
def test_the_largest_batch_fits_and_the_next_one_does_not():
    fit = fit_of(200 * MIB)
    largest, lanes = largest_in(200), fit.config.data.lanes
    assert largest % lanes == 0
    assert fit.fastest(largest)
    with pytest.raises(UserError, match="memory: a global batch of"):
        fit.fastest(largest + lanes)


@pytest.mark.slow
def test_more_memory_or_more_ranks_hold_more():
    assert largest_in(300) > largest_in(200)
    assert largest_in(200, world_size=4) > 1.5 * largest_in(200)


@pytest.mark.slow
def test_choices_fit_and_the_fastest_comes_first():
    fit = fit_of(250 * MIB)
    choices = fit.fastest(8192, top=20)
    assert len(choices) > 3
    seconds = [float(f"{choice.cost.seconds:.3g}") for choice in choices]
    assert seconds == sorted(seconds)
    for choice in choices:
        assert fit.fits(choice.account)
        assert choice.account == fit.account(choice.config)  # of these settings, not of others
        words = choice.words().split()
        again = load(None, ["train.epochs=1", "train.global_batch_size=8192", *words], 2)
        assert settings_of(again) == choice.settings


@pytest.mark.slow
def test_what_is_fixed_stays():
    fit = fit_of(
        250 * MIB, fixed=("zero_stage", "micro_batch_size", "similarity.gather"), zero_stage=2, micro_batch_size=32
    )
    for choice in fit.fastest(4096):
        settings = choice.settings
        assert (settings["zero_stage"], settings["micro_batch_size"], settings["similarity.gather"]) == (2, 32, "all")
    with pytest.raises(UserError, match="fixed: expected keys among"):
        fit_of(MIB, fixed=("precision",))


def test_graphs_are_kept_as_far_as_memory_goes():
    fixed = ("zero_stage", "micro_batch_size", "recompute_image", "recompute_text", "similarity.gather", "offload")
    fit = fit_of(250 * MIB, fixed=fixed, micro_batch_size=64)
    best = fit.fastest(8192)[0]
    kept = best.settings["kept_micro_batches"]
    assert 0 < kept < 64
    assert not fit.fits(fit.account(changed(best.config, kept_micro_batches=kept + 1)))


@pytest.mark.slow
def test_where_nothing_fits_the_largest_component_and_its_knob_are_named():
    with pytest.raises(UserError) as error:
        fit_of(2 * MIB).fastest(4096)
    message = str(error.value)
    assert message.startswith("memory: a global batch of 4096 on 2 ranks needs")
    assert "largest: " in message
    assert "got 2.0 MiB" in message
    assert message.endswith("or a smaller train.global_batch_size")
    with pytest.raises(
        UserError, match=r"memory: a global batch of 8 .* or a smaller model: no global batch is smaller"
    ):
        fit_of(1).largest()


@pytest.mark.slow
def test_where_nothing_fits_only_what_was_not_tried_is_proposed():
    fixed = ("micro_batch_size", "recompute_image", "recompute_text")
    with pytest.raises(UserError, match=r"largest: image activations.*; execution.micro_batch_size below 1024, or"):
        fit_of(20 * MIB, fixed=fixed, micro_batch_size=1024).fastest(4096)
    with pytest.raises(UserError) as error:
        fit_of(2 * MIB).fastest(2**24)
    assert "execution." not in str(error.value)


@pytest.mark.slow
def test_the_hosts_memory_is_a_limit_of_its_own():
    fit = fit_of(250 * MIB)
    fit.host_memory = MIB
    with pytest.raises(UserError, match="host_memory: a global batch of 8192 needs"):
        fit.fastest(8192)


def test_mistakes_in_the_batch_are_told_as_at_the_start_of_a_run():
    with pytest.raises(UserError, match=r"train.global_batch_size: expected a multiple of data.lanes = 8, got 100"):
        fit_of(250 * MIB).fastest(100)


def test_execution_auto_is_a_word_beside_which_keys_may_stand(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {epochs: 1}\nexecution: auto\n")
    words = ["execution.micro_batch_size=32", "execution.similarity.gather=ring", "execution.precision=bf16"]
    config = load(file, words)
    assert config.execution.auto
    assert given(config) == {"micro_batch_size", "similarity.gather"}
    assert load(None, ["train.epochs=1", "execution.zero_stage=1", "execution=auto"]).execution.zero_stage == 1
    assert not load(file, ["execution.auto=false"]).execution.auto
    settled = changed(with_batch(config, 256), auto=False, zero_stage=1)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump(settled))
    assert load(again) == settled


WORDS = [
    "data.image_size=16", "data.context_length=8", "model.embedding_width=32", "model.image.width=8",
    "model.text.width=32", "model.text.layers=2", "train.epochs=1",
    "deepspeed.zero_optimization.reduce_bucket_size=100000",
]  # fmt: skip


def test_the_command_line_tells_deepspeed_what_it_would_look_for(monkeypatch):
    """It would print a warning of its own in the middle of the answer."""
    from amclr_scale.commands.fit import main

    monkeypatch.setenv("DS_ACCELERATOR", "")  # so that it is as it was afterwards
    monkeypatch.delenv("DS_ACCELERATOR")
    assert main(["--gpus", "0"]) == 2
    assert os.environ["DS_ACCELERATOR"] == device_type()


def test_the_command_line_answers_and_says_what_is_wrong(capsys, tmp_path):
    from amclr_scale.commands.fit import main

    found = tmp_path / "found.json"
    asked = ["--gpus", "2", "--device", "h100", "--memory", "250MiB", "--num-samples", "10000", "--batch", "4096"]
    assert main([*asked, "--json", str(found), *WORDS, "execution.zero_stage=1"]) == 0
    out = capsys.readouterr().out
    best = json.loads(found.read_text())["choices"][0]
    assert best["settings"]["zero_stage"] == 1
    assert f"execution.micro_batch_size={best['settings']['micro_batch_size']}" in out
    assert best["peak_bytes"] <= 250 * MIB
    needed = f"{in_words(best['host_bytes'])} for a rank, {in_words(2 * best['host_bytes'])} for a node"
    assert best["host_bytes"] > 0
    assert f"{needed} (no limit: set one with --host-memory)" in out
    assert main([*asked, "--host-memory", "2GiB", *WORDS, "execution.zero_stage=1"]) == 0
    assert f"{needed} (at most 2.00 GiB for a rank)" in capsys.readouterr().out
    for wrong, key in (
        (["--gpus", "2", "--device", "h10000"], "--device: expected cpu"),
        (["--gpus", "0"], "--gpus: expected at least 1, got 0"),
        ([*asked, "--top", "0"], "--top: expected at least 1"),
        ([*asked, "--num-samples", "-5"], "--num-samples: expected at least 1"),
        ([*asked, "--json", "/nowhere/found.json"], "--json: expected a file in a folder that exists"),
        ([*asked, "--memory", "much"], "--memory: expected a size"),
        ([*asked, "--utilisation", "2"], "--utilisation: expected a share"),
        ([*asked, "--verify"], "--verify: runs the largest batch on this CPU"),
        (["--gpus", "3"], "data.lanes: expected a multiple"),
    ):
        assert main([*wrong, *WORDS]) == 2
        assert key in capsys.readouterr().err
