"""How a model to start from reads pictures: positions of another size are timm's, statistics the image processor's."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from amclr_scale.config.load import build, dump
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.start.of_transformers import pixel_statistics
from amclr_scale.encoders.start.positions import fit_positions
from amclr_scale.encoders.start.taken import resolve
from amclr_scale.engine.build import model_of
from amclr_scale.torchvision_ops import import_torchvision

TEXT = {"width": 16, "layers": 1, "heads": 2}


def recipe(name="timm/vit_tiny_patch16_224", size=32, init=None, **image):
    model = {"embedding_width": 8} if init is None else {"init": str(init)}
    sides = {"image": {"name": name, **image}, "text": TEXT} if init is None else {}
    return build({"train": {"samples": 256}, "data": {"image_size": size}, "model": {**model, **sides}})


def ended(folder, config):
    """What a run leaves; its positions are far from 0."""
    folder.mkdir()
    torch.manual_seed(0)
    model = model_of(config, load_tokenizer("emoji", config.data.context_length))
    state = {n: v.contiguous() + torch.randn_like(v) * ("pos" in n) for n, v in model.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    (folder / "config.yaml").write_text(dump(config))
    return folder, state


SMALL = {"options": {"depth": 1, "embed_dim": 12, "num_heads": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}])
def test_positions_are_timms_own(tmp_path, options):
    """Those of `set_input_size`, which resizes a model in place; all other weights are as they were."""
    import_torchvision()
    import timm

    keys = {"options": {**SMALL["options"], **options}}
    run, state = ended(tmp_path / "run", recipe(**keys))
    config = resolve(recipe(size=80, init=run))
    assert config.data.image_size == 80
    found = model_of(config, load_tokenizer("emoji", config.data.context_length))
    assert "model.init: positions image_tower.pos_embed interpolated from 2 x 2 patches to 5 x 5" in found.notes
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **keys["options"])
    theirs.load_state_dict(
        {n.removeprefix("image_tower."): v for n, v in state.items() if n.startswith("image_tower.")}
    )
    theirs.set_input_size(img_size=80)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(found.state_dict()[f"image_tower.{name}"], value, rtol=0, atol=1e-6)
    images = torch.randn(2, 3, 80, 80)
    torch.testing.assert_close(found.eval().image_tower(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)


def test_tables_of_other_libraries():
    """(rows, width) as open_clip has it; of texts, and of what is no square grid, nothing."""
    own = {"image_tower.p": torch.zeros(17, 3), "text_tower.p": torch.zeros(17, 3), "image_tower.q": torch.zeros(7, 3)}
    state = {"image_tower.p": torch.randn(5, 3), "text_tower.p": torch.randn(5, 3), "image_tower.q": torch.randn(5, 3)}
    before = dict(state)
    assert fit_positions(state, own) == ["model.init: positions image_tower.p interpolated from 2 x 2 patches to 4 x 4"]
    assert torch.equal(state["image_tower.p"][0], before["image_tower.p"][0])  # the class token's
    assert state["image_tower.p"].shape == (17, 3)
    torch.testing.assert_close(state["image_tower.p"][1:].mean(0), before["image_tower.p"][1:].mean(0))
    assert all(state[name] is before[name] for name in ("text_tower.p", "image_tower.q"))


@pytest.mark.parametrize("how", [{"rescale_offset": True}, {"do_normalize": False}, {"do_rescale": False}, {}], ids=str)
def test_statistics_of_pixels_are_what_an_image_processor_does(how):
    """(x / 255 - mean) / std is its factor, its offset and its normalisation, of every pixel."""
    import_torchvision()
    import transformers

    processor = transformers.EfficientNetImageProcessor(
        size={"height": 8, "width": 8}, include_top=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], **how
    )
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    want = torch.as_tensor(processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in pixel_statistics(processor))
    got = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
