"""A model of transformers' parts goes back to transformers: its own classes give the same embeddings."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import amclr_scale
from amclr_scale.config.load import build, dump
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.libraries.transformers_parts import save_architectures
from amclr_scale.encoders.start.taken import resolve
from amclr_scale.engine.build import model_of
from amclr_scale.errors import UserError
from amclr_scale.trained import as_dual_encoder
from tests.encoders.test_start import KINDS, recipe, saved
from tests.evaluation.test_foreign import TEXTS, wide_picture

pytestmark = pytest.mark.slow


def exported(config, folder):
    """As an export lies there, of weights that have been trained since they were read."""
    from safetensors.torch import save_file

    tokens = load_tokenizer(config.data.tokenizer, config.data.context_length)
    model = model_of(config, tokens)
    generator = torch.Generator().manual_seed(1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if value.is_floating_point() and not name.startswith("normalise."):
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.02)
    folder.mkdir()
    save_file(state, folder / "weights.safetensors")
    (folder / "config.yaml").write_text(dump(config))
    tokens.save(folder / "tokenizer")
    save_architectures(model, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_s_own_class_gives_the_same_embeddings(tmp_path, kind):
    source, *_ = saved(kind, tmp_path / "source")
    config = resolve(recipe(tmp_path / "source"))
    folder = exported(config, tmp_path / "export")
    as_dual_encoder.write(folder)
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    theirs, report = AutoModel.from_pretrained(str(folder), output_loading_info=True)
    assert type(theirs) is type(source)
    assert not any(report.values())
    ours, words = amclr_scale.load(folder), AutoTokenizer.from_pretrained(str(folder))
    assert words.model_max_length == 16
    filled = kind.startswith("siglip")
    texts = [*TEXTS, " ".join(TEXTS * 4), ""]
    read = words(texts, padding="max_length" if filled else True, truncation=True, return_tensors="pt")
    given = {"input_ids": read["input_ids"]} if filled else {k: read[k] for k in ("input_ids", "attention_mask")}
    picture = Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy())
    processor = AutoImageProcessor.from_pretrained(str(folder))
    seen = processor(picture, return_tensors="pt")
    with torch.no_grad():
        text = F.normalize(theirs.eval().get_text_features(**given).pooler_output, dim=-1)
        image = F.normalize(theirs.get_image_features(**seen).pooler_output, dim=-1)
    torch.testing.assert_close(text, ours.encode_text(texts), rtol=0, atol=1e-6)
    torch.testing.assert_close(image, ours.encode_image([picture]), rtol=0, atol=1e-6)
    large = Image.fromarray(torch.randint(0, 256, (13, 9, 3), dtype=torch.uint8).numpy()).resize((64, 96))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    pixels = 255 * (processor(large, return_tensors="pt")["pixel_values"][0] * std + mean)
    apart = (pixels - ours.pixels(large)).abs()  # resized by two libraries, which round differently
    assert apart.max() < 1.5
    assert apart.mean() < 0.1  # by another filter it is more than 1
    for name in ("logit_scale", "logit_bias") if filled else ("logit_scale",):
        assert getattr(theirs, name).item() == getattr(ours.module, name).item() != getattr(source, name).item()


def test_it_is_started_from_again(tmp_path):
    """And says the same of sizes, pixels and captions as what the first run was started from."""
    saved("clip", tmp_path / "source")
    config = resolve(recipe(tmp_path / "source"))
    folder = exported(config, tmp_path / "export")
    as_dual_encoder.write(folder)
    for ours in ("config.yaml", "weights.safetensors"):
        (folder / ours).unlink()  # as somebody else's folder
    again = resolve(recipe(folder))
    apart = {"data": {"tokenizer"}, "model": {"init", "image", "text", "temperature"}}
    left, right = (each.model_dump(exclude=apart) for each in (config, again))
    assert left == right
    shorter = exported(resolve(recipe(tmp_path / "source", data={"context_length": 8})), tmp_path / "shorter")
    as_dual_encoder.write(shorter)
    assert resolve(recipe(f"transformers/{shorter}")).data.context_length == 8
    seen = amclr_scale.load(f"transformers/{folder}")
    ours = amclr_scale.load(exported(again, tmp_path / "twice"))
    assert seen.encode_image([wide_picture()]).shape == ours.encode_image([wide_picture()]).shape == (1, 16)


def test_weights_that_have_no_place_are_told(tmp_path):
    theirs, *_ = saved("clip", tmp_path / "source")
    config = resolve(recipe(tmp_path / "source"))
    model = model_of(config, load_tokenizer(config.data.tokenizer, config.data.context_length))
    theirs.config.projection_dim = 8
    with pytest.raises(
        UserError, match=r"^--to transformers_dual_encoder: CLIPModel does not take .*: text_projection"
    ):
        as_dual_encoder._fill(type(theirs)(theirs.config), model)


def test_other_parts_are_refused_by_name(tmp_path):
    saved("clip", tmp_path / "source")
    small = exported(build({"train": {"samples": 256}, "data": {"image_size": 32}}), tmp_path / "small")
    with pytest.raises(UserError) as told:
        as_dual_encoder.write(small)
    assert [line.partition(":")[0] for line in str(told.value).splitlines()[1:]] == [
        "model.image.name", "model.text.name", "data.tokenizer",
    ]  # fmt: skip
    towers = {side: {"name": f"transformers/{tmp_path}/source", "pretrained": True} for side in ("image", "text")}
    towers["text"] |= {"projection": "mlp"}
    tree = {
        "train": {"samples": 256}, "model": {"embedding_width": 16, **towers},
        "data": {"tokenizer": str(tmp_path / "source"), "image_size": 32, "context_length": 16},
    }  # fmt: skip
    mixed = exported(build(tree), tmp_path / "mixed")
    with pytest.raises(UserError) as told:
        as_dual_encoder.write(mixed)
    assert str(told.value).splitlines()[1:] == [
        "model.text.pooling: expected model, got last",
        "model.text.projection: expected linear, got mlp",
    ]
