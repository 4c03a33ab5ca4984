"""Towers by name, their weights from local files, their errors: the key first, and no wait for a network."""

import argparse
import socket

import pytest
import torch

from amclr_scale.config.schema import ImageTower, TextTower
from amclr_scale.encoders.image_towers import build_image_tower
from amclr_scale.encoders.text_towers import PooledTower, build_text_tower
from amclr_scale.errors import UserError
from tests.encoders.test_dual_encoder import B, D, L, images, model, tokens

IMAGE_TOWERS = {
    "torchvision/resnet18": 512,
    "torchvision/mobilenet_v3_small": 1024,
    "torchvision/vit_b_16": 768,
    "timm/resnet18": 512,
    "timm/mobilenetv3_small_100": 1024,
    "timm/vit_tiny_patch16_224": 192,
    "timm/convnext_atto": 320,
}


@pytest.mark.parametrize("name", IMAGE_TOWERS)
@pytest.mark.slow
def test_image_towers_lose_their_classifier(name):
    norm = "default" if "vit" in name or "convnext" in name else "group"
    encoder = model(image=ImageTower(name=name, norm=norm))
    out = encoder(images=(images()[:2],), features=True)
    assert out["image_features"].shape == (2, IMAGE_TOWERS[name])
    assert len(encoder.blocks()["image"]) >= 4
    if name != "torchvision/vit_b_16":  # 86 million parameters; timm's small one has the same parts
        out["image"].sum().backward()
        assert [n for n, p in encoder.image_tower.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("kind", "pooling"), [("distilbert", "first"), ("roberta", "first"), ("bert", "first"), ("clip", "last")]
)
def test_text_towers_of_transformers(small_transformers, kind, pooling):
    encoder = model(text=TextTower(name=f"transformers/{kind}")).double().eval()
    assert encoder.text_tower.pooling == pooling
    out = encoder(texts=(tokens(),))["text"]
    assert out.shape == (B, D)
    out.square().cumsum(0).sum().backward()
    assert [n for n, p in encoder.text_tower.named_parameters() if p.grad is None] == []
    for row in range(B):  # each caption by itself, so with other padding
        torch.testing.assert_close(encoder(texts=(tokens()[row : row + 1],))["text"][0], out[row], rtol=1e-9, atol=1e-9)
    assert len(encoder.blocks()["text"]) == 2


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_never_matters(pooling):
    encoder = model(text=TextTower(width=16, layers=2, pooling=pooling)).double().eval()
    short, long = tokens()[:, :8].clone(), torch.zeros(B, L, dtype=torch.int64)
    long[:, :8] = short
    torch.testing.assert_close(encoder(texts=(short,))["text"], encoder(texts=(long,))["text"], rtol=1e-12, atol=1e-12)
    empty = encoder(texts=(torch.zeros(2, L, dtype=torch.int64),))["text"]
    assert empty.isfinite().all()


def test_what_is_padding():
    """Only what follows the last word; and where the end token pads, the first of them is still read."""

    class Places(torch.nn.Module):
        def forward(self, ids, visible):
            self.visible = visible
            return ids[:, :, None].double()

    ids = torch.tensor([[5, 0, 7, 0, 0], [6, 0, 0, 0, 0]])
    tower = PooledTower(Places(), pad_id=0, pooling="last")
    assert tower(ids).flatten().tolist() == [7, 6]
    assert tower.tokens.visible.tolist() == [[True, True, True], [True, False, False]]
    tower = PooledTower(Places(), pad_id=0, pooling="mean", ends_with_pad=True)
    assert tower(ids).flatten().tolist() == [3, 3]
    assert tower.tokens.visible.tolist() == [[True, True, True, True], [True, True, False, False]]


def test_weights_come_from_files(tmp_path):
    from safetensors.torch import save_file

    donor = model(1)
    for tower, name in (
        (donor.image_tower.state_dict(), "tower.safetensors"),
        ({f"{k}": v for k, v in donor.state_dict().items()}, "whole.safetensors"),
    ):
        save_file({k: v.contiguous() for k, v in tower.items()}, tmp_path / name)
        new = model(2, image=ImageTower(width=8, weights=str(tmp_path / name)))
        torch.testing.assert_close(new.image_tower.state_dict(), donor.image_tower.state_dict())
        assert not torch.equal(new.text_head[1].weight, donor.text_head[1].weight)
    classifier = {f"module.{k}": v for k, v in donor.image_tower.state_dict().items()} | {
        "module.fc.weight": torch.zeros(9, 64)
    }
    torch.save({"state_dict": classifier, "epoch": 3}, tmp_path / "tower.pt")
    new = model(2, image=ImageTower(width=8, weights=str(tmp_path / "tower.pt")))
    torch.testing.assert_close(new.image_tower.state_dict(), donor.image_tower.state_dict())


def test_weights_that_do_not_fit(tmp_path):
    good = model().image_tower.state_dict()
    first = next(iter(good))
    cases = {
        "missing.pt": ({k: v for k, v in good.items() if k != first}, r"1 of its \d+ tensors are missing"),
        "foreign.pt": (good | {"other": torch.zeros(1)}, r"1 are unknown \(other\)"),
        "shape.pt": (good | {first: torch.zeros(1)}, "other shapes"),
        "table.pt": ({"epoch": 3}, "no plain table"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=rf"^model.image.weights: .*{message}"):
            model(image=ImageTower(width=8, weights=str(tmp_path / name)))
    (tmp_path / "broken.pt").write_bytes(b"not a file of torch")
    for name, message in (("broken.pt", "cannot be read"), ("nowhere.pt", "does not exist")):
        with pytest.raises(UserError, match=rf"^model.image.weights: .*{message}"):
            model(image=ImageTower(width=8, weights=str(tmp_path / name)))


def test_the_text_tower_of_a_whole_clip(tmp_path):
    """OpenAI's on the hub: it pads with its end token, and its configuration names another number for that."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    numbers = {"vocab_size": 50, "max_position_embeddings": 10, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(text_config={**sizes, **numbers}, vision_config={**sizes, "image_size": 32})).eval()
    whole.save_pretrained(tmp_path)
    tower = TextTower(name=f"transformers/{tmp_path}", pretrained=True)
    ours, width = build_text_tower(tower, vocab_size=50, pad_id=49, end_id=49, context_length=10)
    ids = torch.tensor([[48, 7, 1, 49, 49, 49], [48, 3, 4, 5, 6, 49]])
    with torch.no_grad():
        tokens = whole.text_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(ours.eval()(ids), tokens[[0, 1], [3, 5]], rtol=1e-5, atol=1e-6)
    assert width == 32


def test_transformers_folders(small_transformers, tmp_path):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model("distilbert")
    config.vocab_size, config.pad_token_id, config.max_position_embeddings = 60, 0, 20
    trained = AutoModel.from_config(config)
    trained.save_pretrained(tmp_path)
    name = f"transformers/{tmp_path}"
    loaded = model(text=TextTower(name=name, pretrained=True)).text_tower.tokens.model
    torch.testing.assert_close(loaded.state_dict(), trained.state_dict())
    random = model(text=TextTower(name=name)).text_tower.tokens.model
    assert random.embeddings.word_embeddings.weight.shape[0] == 50
    weight = "transformer.layer.0.ffn.lin1.weight"
    assert not torch.equal(random.state_dict()[weight], trained.state_dict()[weight])

    config.vocab_size = 40
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^data.tokenizer: its 50 words do not fit the 40"):
        model(text=TextTower(name=name, pretrained=True))
    config.vocab_size, config.pad_token_id = 60, 3
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^data.tokenizer: pads with 0.*trained with 3"):
        model(text=TextTower(name=name, pretrained=True))
    config.pad_token_id, config.max_position_embeddings = 0, 8
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^data.context_length: expected at most 8"):
        model(text=TextTower(name=name, pretrained=True))


BAD_NAMES = [
    (ImageTower(name="torchvision/resnet51"), r"^model.image.name: .*did you mean 'resnet50"),
    (ImageTower(name="torchvision/inception_v3"), r"^model.image.name: .*several outputs"),
    (ImageTower(name="timm/vit_tiny_patch16"), r"^model.image.name: .*did you mean"),
    (ImageTower(name="timm/test_vit", options={"drop_paths": 1}), r"^model.image.options: .*does not take drop_paths"),
    (
        ImageTower(name="timm/test_vit", options={"img_size": 64}),
        r"^model.image.options.img_size: data.image_size says",
    ),
    (ImageTower(name="timm/hf_hub:timm/resnet50"), r"^model.image.name: .*model.image.weights a local file"),
    (
        ImageTower(name="resnet50"),
        r"^model.image.name: expected small_resnet, torchvision/NAME, timm/NAME, transformers/NAME or open_clip/NAME",
    ),
    (ImageTower(name="torchvision/vit_b_16", norm="batch"), r"^model.image.norm: "),
    (ImageTower(depth=12), r"^model.image.depth: expected 10 or 18, got 12"),
    (TextTower(name="transformers/bert-base-uncased"), r"^model.text.name: .*Nothing is downloaded"),
    (TextTower(name="transformers/distillbert"), r"^model.text.name: .*did you mean 'distilbert"),
    (TextTower(name="transformers/t5"), r"^model.text.name: t5 has a decoder"),
    (TextTower(name="bert"), r"^model.text.name: expected small_transformer"),
    (TextTower(heads=3, width=16), r"^model.text.heads: expected a divisor of model.text.width = 16"),
    (TextTower(name="transformers/distilbert", pretrained=True), r"^model.text.pretrained: expected a local folder"),
]


@pytest.mark.parametrize(("tower", "message"), BAD_NAMES, ids=lambda value: getattr(value, "name", ""))
def test_mistakes_name_their_key_and_never_ask_the_network(tower, message, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a look-up on the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(UserError, match=message):
        model(**{"image" if isinstance(tower, ImageTower) else "text": tower})


def test_a_folder_without_config(tmp_path):
    with pytest.raises(UserError, match=r"^model.text.name: the folder .* has no config.json"):
        model(text=TextTower(name=f"transformers/{tmp_path}"))


def test_a_vit_that_pictures_do_not_fit():
    with pytest.raises(UserError, match=r"^data.image_size: torchvision/vit_b_16 cannot be built for 33 pixels"):
        build_image_tower(ImageTower(name="torchvision/vit_b_16"), 33)


WRAPPED = [
    "{}", "module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "model.{}", "module.module.{}",
    "visual.trunk.{}", "net.student.{}",
]  # fmt: skip


def test_weights_under_the_names_that_training_scripts_give_them(tmp_path):
    """DDP's, torch.compile's, Lightning's, open_clip's, DeepSpeed's, timm's."""
    tower, *_ = build_image_tower(ImageTower(name="timm/test_vit"), 32)
    state = tower.state_dict()
    path = tmp_path / "weights.pt"

    def loaded(saved):
        torch.save(saved, path)
        with torch.device("cpu"):
            made, *_ = build_image_tower(ImageTower(name="timm/test_vit", weights=str(path)), 32)
        return all(torch.equal(value, state[name]) for name, value in made.state_dict().items())

    for form in WRAPPED:
        assert loaded({"state_dict": {form.format(name): value for name, value in state.items()}}), form
    compiled_inside = {name.replace("blocks.", "blocks._orig_mod."): value for name, value in state.items()}
    assert loaded(compiled_inside)
    whole = {f"visual.trunk.{name}": value for name, value in state.items()}
    assert loaded({**whole, "visual.head.proj.weight": torch.zeros(8, 64), "logit_scale": torch.tensor(2.0)})
    args = argparse.Namespace(lr=1.0, out=None)
    for saved in (
        {"model_state_dict": state}, {"epoch": 3, "model_ema": state}, {"model": {"state_dict": state}},
        {"state_dict_ema": state, "state_dict": state, "epoch": 3}, {"model": state, "args": args},
    ):  # fmt: skip
        assert loaded(saved), list(saved)

    with pytest.raises(
        UserError, match=r"several times, under (student|teacher)\. or (student|teacher)\.; save the one"
    ):
        loaded({f"{which}.{name}": value for which in ("student", "teacher") for name, value in state.items()})
    with pytest.raises(UserError, match=r"its names begin with encoder\., decoder\., the tower's with"):
        loaded({"encoder.a": torch.ones(1), "encoder.b": torch.ones(1), "decoder.a": torch.ones(1)})
    with pytest.raises(UserError, match="cannot be read as weights: it holds Python objects beside tensors"):
        loaded({"model": tower})
