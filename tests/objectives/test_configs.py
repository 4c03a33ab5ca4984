"""configs/objectives/*.yaml load, and name objectives that can be made from them."""

from pathlib import Path

import pytest

from amclr_scale import objectives
from amclr_scale.config.load import load

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted((CONFIGS / "objectives").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_names_an_objective_and_feeds_it(path):
    config = load(path)
    options = dict(config.objective)
    objective = objectives.create(options.pop("name"), num_samples=4938, **options)
    assert path.stem in (objective.name, f"{objective.name}_{options.get('version')}", f"{objective.name}_layers")
    assert path.stem.endswith("_layers") == bool(options.get("layers"))
    assert len(config.model.image.taps) == objective.inputs.count("image_layers")
    for views in ("image_views", "text_views", "text_negatives"):
        assert getattr(config.data, views) == objective.inputs.count(views)


def test_every_arm_of_the_comparison_is_there():
    arms = {"clip", "siglip", "dcl", "sogclr", "isogclr", "amclr", "xamclr", "cyclip", "fastclip_v3"}
    arms |= {"fifo_bank", "momentum_queue", "full_bank", "fifo_bank_layers"}
    arms |= {"simclr", "slip", "supcon", "decoupled", "one_to_k", "siglip_plus", "debiased"}
    arms |= {"scent", "vrns", "drrho", "neuclip", "amorlip"}
    arms |= {"negclip", "byolip", "count", "degla", "distill", "mochi", "meow", "pamc", "m3col"}
    arms |= {"gram", "m2_mixup", "cacr", "swav", "siamlip", "barlip", "rankclip", "cwcl", "filip"}
    assert {path.stem for path in FILES} == arms


def test_the_strong_recipe_is_the_quickstart_but_for_its_four_means():
    strong, plain = load(CONFIGS / "recipes" / "strong.yaml"), load(CONFIGS / "quickstart.yaml")
    assert dict(strong.objective) == {**plain.objective, "label_smoothing": 0.1}
    for side in ("image", "text"):
        ours, theirs = getattr(strong.model, side), getattr(plain.model, side)
        assert (ours.projection, ours.dropout) == ("mlp", 0.1)
        assert ours.model_copy(update={"projection": theirs.projection, "dropout": theirs.dropout}) == theirs
    assert strong.data.augmentation != plain.data.augmentation
    assert strong.data.model_copy(update={"augmentation": plain.data.augmentation}) == plain.data
    assert (strong.train, strong.optimizer) == (plain.train, plain.optimizer)
