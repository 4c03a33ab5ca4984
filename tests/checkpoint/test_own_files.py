"""A run goes on without the folder that it began from, with the same model, and says which copies it reads."""

import shutil

import pytest
import torch

from amclr_scale.checkpoint.own_files import settled
from amclr_scale.checkpoint.resume import differences
from amclr_scale.config.load import build, dump
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.libraries.transformers_parts import save_architectures
from amclr_scale.encoders.start.taken import resolve
from amclr_scale.engine.build import model_of
from amclr_scale.errors import UserError
from tests.encoders.test_start import TEXTS, recipe, saved


def begun(init, place, **sections):
    """A run that has begun: its configuration, and embeddings of its model."""
    config = resolve(recipe(init, **sections))
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.context_length)
    model = model_of(config, tokenizer).eval()
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(dump(config))
    tokenizer.save(place / "tokenizer")
    save_architectures(model, place)
    return config, model


def embedded(config, model):
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.context_length)
    pictures = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).remainder(255).byte()
    with torch.no_grad():
        out = model.eval()(images=(pictures,), texts=(tokenizer(TEXTS),))
    return torch.cat([out["image"], out["text"]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_run_goes_on_without_what_it_began_from(tmp_path, kind):
    init, runs = tmp_path / "init", tmp_path / "runs"
    saved(kind, init)
    before, model = begun(init, runs / "a", run={"folder": str(runs), "name": "a"})
    wanted, weights = embedded(before, model), model.state_dict()
    shutil.move(init, tmp_path / "moved")
    for resume, name in (("auto", "a"), (str(runs / "a"), None), (str(runs / "a/checkpoints/step_00000008"), None)):
        again = settled(recipe(init, run={"folder": str(runs), "name": name}, resume=resume), 1)
        changed = differences(before.model_dump(mode="json"), again)
        assert set(changed) == set(again.resume_changed) == {"data.tokenizer", "model.image.name", "model.text.name"}
        assert again.data.tokenizer == str(runs / "a" / "tokenizer")
    built = model_of(again, load_tokenizer(again.data.tokenizer, again.data.context_length), weights=False)
    built.load_state_dict(weights)
    assert embedded(again, built).equal(wanted)
    (runs / "a" / "config.yaml").write_text(dump(again))  # as the second start leaves it
    third = settled(recipe(init, run={"folder": str(runs), "name": "a"}, resume="auto"), 1)
    assert differences(again.model_dump(mode="json"), third) == {}
    with pytest.raises(UserError, match=r"^model.init: expected a run or an export of ours, .* which is not there"):
        settled(recipe(init, run={"folder": str(runs), "name": "b"}, resume="auto"), 1)  # another run
    with pytest.raises(UserError, match=r"^model.init: .* which is not there"):
        settled(recipe(init, run={"folder": str(runs), "name": "a"}), 1)


def test_what_the_recipe_says_is_left_and_compared(tmp_path):
    init, runs = tmp_path / "init", tmp_path / "runs"
    saved("clip", init)
    before, _ = begun(init, runs / "a", model={"temperature": 0.05})
    shutil.rmtree(init)
    again = settled(recipe(init, model={"temperature": 0.07}, run={"folder": str(runs), "name": "a"}, resume="auto"), 1)
    assert again.model.temperature == 0.07
    assert "model.temperature" in differences(before.model_dump(mode="json"), again)
    assert "model.temperature" not in again.resume_changed


def test_a_tokenizer_that_is_gone_is_the_run_s_own(tmp_path):
    init, runs = tmp_path / "words", tmp_path / "runs"
    load_tokenizer("emoji", 32).save(init)
    config = build(
        {"train": {"samples": 256}, "data": {"tokenizer": str(init)}, "run": {"folder": str(runs)}, "resume": "auto"}
    )
    (runs / "a" / "checkpoints").mkdir(parents=True)
    (runs / "a" / "checkpoints" / "latest").write_text("step_00000008")
    (runs / "a" / "config.yaml").write_text(dump(config))
    shutil.copytree(init, runs / "a" / "tokenizer")
    assert settled(config, 1) == config
    shutil.rmtree(init)
    again = settled(config, 1)
    assert again.resume_changed == ["data.tokenizer"]
    assert again.data.tokenizer == str(runs / "a" / "tokenizer")
