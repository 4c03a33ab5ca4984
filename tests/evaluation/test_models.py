"""Models from files give the features they gave where they came from; what is not there is said in one line."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import save_file

from amclr_scale.config.load import dump, merge
from amclr_scale.config.schema import Config
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import load_model
from amclr_scale.torchvision_ops import import_torchvision
from tests.evaluation.test_run import model, recipe

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CAPTIONS = ["a cat!", "two dogs, running", ""]


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=-1)


def write_run(folder, encoder, config: Config) -> None:
    folder.mkdir(exist_ok=True)
    config = Config.model_validate({**config.model_dump(), "train": {"epochs": 1}})
    (folder / "config.yaml").write_text(dump(config))
    save_file(
        {name: value.contiguous() for name, value in encoder.state_dict().items()}, folder / "weights.safetensors"
    )


def test_a_run_of_ours(tmp_path):
    config = recipe("emoji/val_concept")
    encoder = model(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01)
    write_run(tmp_path / "run", encoder, config)
    tokens = torch.randint(1, 50, (3, 12))
    want = encoder((pixels(16),), (tokens,))
    for name in (tmp_path / "run", tmp_path / "run" / "weights.safetensors"):
        loaded = load_model(str(name))
        assert (loaded.name, loaded.folder) == ("run", tmp_path / "run")
        assert loaded.config.evaluation.splits == ["emoji/val_concept"]
        got = loaded.model((pixels(16),), (tokens,))
        for key in ("image", "text"):
            torch.testing.assert_close(got[key], want[key], rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["sync", "frozen", "batch"])
def test_a_run_with_batch_norm_and_weights_that_are_gone(tmp_path, norm):
    """What a tower began from need not exist any more; stored statistics come with the run."""
    config = recipe()

    def with_tower(**changes) -> Config:
        return Config.model_validate(merge(config.model_dump(), {"model": {"image": changes}}))

    first = model(with_tower(norm="batch"))
    first.image_tower(torch.randn(8, 3, 16, 16))
    save_file(first.image_tower.state_dict(), tmp_path / "tower.safetensors")
    config = with_tower(norm=norm, weights=str(tmp_path / "tower.safetensors"))
    encoder = model(config).eval()
    write_run(tmp_path / "run", encoder, config)
    (tmp_path / "tower.safetensors").unlink()
    got = load_model(str(tmp_path / "run")).model(images=(pixels(16),))["image"]
    torch.testing.assert_close(got, encoder(images=(pixels(16),))["image"], rtol=1e-5, atol=1e-6)


@pytest.fixture
def tiny_clip(tmp_path):
    import_torchvision()
    import open_clip

    for name, width in (("tiny", TINY["embed_dim"]), ("wider", 2 * TINY["embed_dim"])):
        (tmp_path / f"{name}.json").write_text(json.dumps({**TINY, "embed_dim": width}))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    inner = open_clip.create_model("tiny").eval()
    torch.save(inner.state_dict(), tmp_path / "tiny.pt")
    yield inner, tmp_path / "tiny.pt", open_clip
    for name in ("tiny", "wider"):
        (tmp_path / f"{name}.json").unlink()


@pytest.mark.slow
def test_an_open_clip_model(tiny_clip):
    """Same features as through open_clip, its tokenizer and its normalisation."""
    inner, file, open_clip = tiny_clip
    loaded = load_model(f"open_clip/tiny:{file}")
    data = loaded.config.data
    assert (data.image_size, data.context_length, data.tokenizer) == (32, 77, "clip")
    from torchvision.transforms.functional import normalize

    from amclr_scale.data.tokenizers import load_tokenizer

    images = normalize(pixels().float() / 255, inner.visual.image_mean, inner.visual.image_std)
    with torch.no_grad():
        got = loaded.model((pixels(),), (load_tokenizer("clip", 77)(CAPTIONS),))
        torch.testing.assert_close(got["image"], unit(inner.encode_image(images)), rtol=1e-4, atol=1e-6)
        want = unit(inner.encode_text(open_clip.get_tokenizer("ViT-B-32")(CAPTIONS)))
        torch.testing.assert_close(got["text"], want, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=r"^evaluation.probes.features: expected embedding"):
        loaded.model(images=(pixels(),), features=True)
    with pytest.raises(UserError, match=r"^checkpoint: .*does not hold weights of wider"):
        load_model(f"open_clip/wider:{file}")
    other = file.with_name("other.pt")
    for content in (b"\xff\xd8\xff\xe0 a picture", b"", b"{}"):
        other.write_bytes(content)
        with pytest.raises(UserError, match=r"^checkpoint: .*other.pt does not hold weights of tiny: ."):
            load_model(f"open_clip/tiny:{other}")
    torch.save([1, 2], other)
    with pytest.raises(UserError, match=r"^checkpoint: .*other.pt does not hold weights of tiny: ."):
        load_model(f"open_clip/tiny:{other}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"^checkpoint: expected a run folder .*nowhere.*does not exist"),
        ("open_clip/ViT-B-33:x.pt", r"^checkpoint: open_clip has no architecture ViT-B-33"),
        ("open_clip/ViT-B-32", r"^checkpoint: expected open_clip/ViT-B-32:FILE with local weights"),
        (
            "open_clip/tests/encoders",
            r"^checkpoint: expected open_clip_config.json in tests/encoders, as open_clip pub",
        ),
        ("transformers/clip-vit-base-patch32", r"^checkpoint: expected a folder saved by transformers"),
        ("transformers/openai/clip-vit-base-patch32", r"^checkpoint: .*: HF_HUB_OFFLINE is set, and the cache has not"),
    ],
)
def test_what_is_not_there(name, message, monkeypatch, tmp_path):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message):
        load_model(name)
