"""configs/objectives/*.yaml load, and name objectives that can be made from them."""

from pathlib import Path

import pytest

from amclr_scale import objectives
from amclr_scale.config.load import load

FILES = sorted((Path(__file__).parents[2] / "configs" / "objectives").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_names_an_objective_and_feeds_it(path):
    config = load(path)
    options = dict(config.objective)
    objective = objectives.create(options.pop("name"), num_samples=100, **options)
    assert path.stem in (objective.name, f"{objective.name}_{options.get('version')}")
    for views in ("image_views", "text_views"):
        assert getattr(config.data, views) == objective.inputs.count(views)


def test_every_arm_of_the_comparison_is_there():
    arms = {"clip", "siglip", "dcl", "sogclr", "isogclr", "amclr", "xamclr", "cyclip", "fastclip_v3"}
    arms |= {"fifo_bank", "momentum_queue"}
    arms |= {"simclr", "slip", "supcon", "decoupled", "one_to_k", "siglip_plus", "debiased"}
    assert {path.stem for path in FILES} == arms
