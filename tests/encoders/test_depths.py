"""Rates that fall with depth: BEiT's, by timm's grouping of its models; and the same on other models."""

import pytest
import torch

from amclr_scale.config.load import build
from amclr_scale.config.schema import ImageTower
from amclr_scale.encoders.depths import depths
from amclr_scale.encoders.image_towers import build_image_tower
from amclr_scale.engine.optimizers import parameter_groups
from amclr_scale.memory.account import account
from amclr_scale.memory.towers import skeleton
from amclr_scale.torchvision_ops import import_torchvision


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])
def test_as_beit_has_it(name):
    import_torchvision()
    import timm.optim

    tower, *_ = build_image_tower(ImageTower(name=f"timm/{name}"), 160 if name == "test_vit" else 224)
    groups = timm.optim.param_groups_layer_decay(tower, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    found = depths(tower, torch.zeros(2, 3, *tower.patch_embed.img_size))
    assert found.keys() == {key for key, _ in tower.named_parameters()}
    for key, parameter in tower.named_parameters():
        after = key.startswith("norm.")  # which timm counts with the last block
        assert 0.5 ** found[key] == pytest.approx(scales[id(parameter)] * (1 if after else 0.5)), key


def test_groups_of_a_model_and_of_its_account():
    """Whose text tower, OPT, declares the last norm before its layers."""
    config = build({
        "model": {"image": {"width": 8}, "text": {"name": "transformers/opt"}},
        "data": {"image_size": 32}, "train": {"epochs": 1}, "optimizer": {"layer_decay": 0.5},
    })  # fmt: skip
    model = skeleton(config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), model.no_weight_decay(), config.optimizer, None, model.depths)
    rates = {names[id(p)]: group["lr_factor"] for group in groups for p in group["params"]}
    inside = "text_tower.tokens.model.decoder."
    layers = len({name.split(".")[5] for name in rates if name.startswith(f"{inside}layers.")})
    assert layers > 2
    assert rates[f"{inside}embed_tokens.weight"] == 0.5 ** (layers + 1)
    assert rates[f"{inside}layers.0.fc1.weight"] == 0.5**layers
    assert rates[f"{inside}layers.{layers - 1}.self_attn.q_proj.bias"] == 0.5
    assert rates[f"{inside}final_layer_norm.weight"] == rates["text_head.1.weight"] == rates["logit_scale"] == 1
    assert [rates[f"image_tower.{part}.weight"] for part in ("stem.0", "stages.0.conv1", "stages.3.conv2")] == [
        0.5**5, 0.5**4, 0.5,
    ]  # fmt: skip
    assert len(groups) > layers
    kept = account(config, world_size=1, num_samples=1000, device="cpu")
    states = {c.name: max(c.by_phase.values()) for c in kept.components if c.name == "optimizer states"}
    assert states["optimizer states"] == pytest.approx(8 * sum(p.numel() for p in model.parameters()), rel=0.01)


def test_a_tower_without_blocks_is_told():
    config = build({
        "model": {"image": {"name": "torchvision/alexnet"}}, "data": {"image_size": 64}, "train": {"epochs": 1},
        "optimizer": {"layer_decay": 0.5},
    })  # fmt: skip
    model = skeleton(config)
    assert "optimizer.layer_decay: torchvision/alexnet has no blocks: all of it learns at one rate" in model.notes
    assert not any(name.startswith("image_tower.") for name in model.depths)
