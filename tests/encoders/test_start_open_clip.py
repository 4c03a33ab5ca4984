"""Starting from open_clip's models, and back: embeddings to 1e-5, weights to the bit."""

import json
import shutil

import pytest
import torch

import amclr_scale
from amclr_scale.config.load import build, dump
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.libraries.transformers_parts import save_architectures
from amclr_scale.encoders.start.taken import resolve
from amclr_scale.engine.build import model_of
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import load_model
from amclr_scale.torchvision_ops import import_torchvision
from amclr_scale.trained import as_open_clip, as_transformers
from amclr_scale.trained.portable import portable
from tests.encoders.test_start import recipe

TEXTS = ["a photo of a cat", "", "a red house on the mat " * 30]
VISION = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
NARROW = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def folder(place, **changes) -> torch.nn.Module:
    """A tiny model with random weights, as open_clip publishes them."""
    import_torchvision()
    import open_clip
    from safetensors.torch import save_file

    model = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": NARROW, "quick_gelu": True, **changes}
    pictures = {"mean": [0.4] * 3, "std": [0.3] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    place.mkdir(parents=True)
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": pictures}))
    torch.manual_seed(0)
    made = open_clip.create_model(f"local-dir:{place}", load_weights=False).eval()
    made.logit_scale.data.fill_(3.0)
    save_file(made.state_dict(), place / "open_clip_model.safetensors")
    return made


def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def check(model, tokens, theirs) -> None:
    import open_clip

    mean, std = model.normalise.mean, model.normalise.std
    with torch.no_grad():
        got = model.eval()(images=(pictures(),), texts=(tokens(TEXTS),))
        image = theirs.encode_image((pictures() / 255 - mean) / std, normalize=True)
        text = theirs.encode_text(open_clip.SimpleTokenizer(context_length=12)(TEXTS), normalize=True)
    torch.testing.assert_close(got["image"], image, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["text"], text, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["logit_scale"], theirs.logit_scale.detach().exp().reshape(1))


@pytest.mark.parametrize("custom", [False, True])
def test_there_and_back(tmp_path, custom):
    """Training may change it; the run's folder, the export and open_clip's own reading of it agree."""
    import open_clip
    from safetensors.torch import save_file

    theirs = folder(tmp_path / "source", custom_text=custom)
    made = resolve(recipe(f"open_clip/{tmp_path}/source"))
    assert made.model == resolve(recipe(tmp_path / "source")).model.model_copy(update={"init": made.model.init})
    assert (made.data.image_size, made.data.context_length, made.evaluation.resize) == (32, 12, "squash")
    tokens = load_tokenizer(made.data.tokenizer, made.data.context_length)
    model = model_of(made, tokens)
    check(model, tokens, theirs)
    if custom:
        return
    assert len(model.blocks()["image"]) == len(model.blocks()["text"]) == 1
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    run = tmp_path / "run"
    run.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, run / "weights.safetensors")
    (run / "config.yaml").write_text(dump(made))
    tokens.save(run / "tokenizer")
    save_architectures(model, run)
    shutil.rmtree(tmp_path / "source")
    as_open_clip.write(run)
    again = open_clip.create_model(f"local-dir:{run}", load_weights=True, weights_only=True).eval()
    check(model, tokens, again)
    reads = again.visual.preprocess_cfg
    assert (reads["mean"], reads["std"], reads["resize_mode"]) == ([0.4] * 3, [0.3] * 3, "squash")
    assert amclr_scale.load(run).encode_text(TEXTS).equal(model(texts=(tokens(TEXTS),))["text"])
    third = resolve(recipe(run))  # the run itself, which also is a folder of open_clip
    assert model_of(third, tokens).state_dict()["logit_scale"].equal(model.state_dict()["logit_scale"])
    as_transformers.write(run)
    from transformers import AutoModel

    with torch.no_grad():
        got = AutoModel.from_pretrained(str(run)).eval().get_text_features(tokens(TEXTS))
        torch.testing.assert_close(got, model(texts=(tokens(TEXTS),))["text"], rtol=0, atol=1e-6)


def test_an_architecture_by_name_and_openai_s_own_file(tmp_path, monkeypatch):
    """Which is an archive of TorchScript in half precision, with numbers beside the weights."""
    import open_clip

    theirs = folder(tmp_path / "source")
    described = json.loads((tmp_path / "source" / "open_clip_config.json").read_text())["model_cfg"]
    for name, changes in (("tiny", {}), ("tiny-gelu", {"quick_gelu": False})):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**described, **changes})
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{n}": v for n, v in theirs.state_dict().items()}}, tmp_path / "a.pt"
    )
    made = resolve(recipe(f"open_clip/tiny:{tmp_path}/a.pt"))
    assert made.model.image.name == made.model.text.name == "open_clip/tiny"
    tokens = load_tokenizer("clip", 12)
    check(model_of(made, tokens), tokens, theirs)
    read = []
    monkeypatch.setattr(torch, "load", lambda *args, _load=torch.load, **named: (
        read.append(named.get("mmap")), _load(*args, **named))[1])  # fmt: skip
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "once.pt")
    model_of(resolve(recipe(f"open_clip/tiny:{tmp_path}/once.pt")), tokens)
    assert read == [True, None]  # scale and bias, from a map of the file; then all of it

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.held = theirs.half()
            self.register_buffer("context_length", torch.tensor(12))

    scripted = torch.jit.script(Holder())
    scripted.save(tmp_path / "openai.pt")
    monkeypatch.setattr(torch.jit.ScriptModule, "state_dict", _without(torch.jit.ScriptModule.state_dict, "held."))
    check(model_of(resolve(recipe(f"open_clip/tiny:{tmp_path}/openai.pt")), tokens), tokens, theirs.float())
    with pytest.raises(
        UserError, match=r"^model.init: .* is OpenAI's own, whose activations are QuickGELU: .*-quickgelu"
    ):
        resolve(recipe(f"open_clip/tiny-gelu:{tmp_path}/openai.pt"))


def _without(state_dict, prefix):
    return lambda *args, **named: {n.removeprefix(prefix): v for n, v in state_dict(*args, **named).items()}


def test_what_is_refused_by_name(tmp_path):
    import_torchvision()
    with pytest.raises(
        UserError, match=r"^model.init: expected open_clip/ARCHITECTURE:FILE with local weights, or open_"
    ):
        resolve(recipe("open_clip/ViT-B-32:nowhere.pt"))
    (tmp_path / "open_clip_model.safetensors").touch()
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 8}}')
    with pytest.raises(UserError, match=r"^model.init: .*json is no description of .*: it lacks text_cfg, vision_cfg$"):
        resolve(recipe(f"open_clip/{tmp_path}"))
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match=r"^model.init: .*json is no description of a model of open_clip: JSONDecode"):
        resolve(recipe(f"open_clip/{tmp_path}"))
    (tmp_path / "x.pt").touch()
    with pytest.raises(
        UserError, match=r"^model.init: expected an architecture of open_clip .*did you mean 'ViT-B-32'"
    ):
        resolve(recipe(f"open_clip/ViT-B-33:{tmp_path}/x.pt"))
    with pytest.raises(UserError, match=r"^model.init: open_clip/ViT-B-16-SigLIP reads captions through timm/"):
        resolve(recipe(f"open_clip/ViT-B-16-SigLIP:{tmp_path}/x.pt"))
    with pytest.raises(UserError, match=r"^model.init: open_clip/coca_ViT-B-32 has CoCa's parts; expected a CLIP with"):
        resolve(recipe(f"open_clip/coca_ViT-B-32:{tmp_path}/x.pt"))


def test_batch_norm_of_a_resnet_is_a_choice_that_keeps_its_statistics(tmp_path):
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    theirs = folder(tmp_path / "source", vision_cfg=resnet)
    with pytest.raises(UserError, match=r"^model.image.norm: .* uses BatchNorm"):
        model_of(resolve(recipe(tmp_path / "source")), load_tokenizer("clip", 12))
    made = resolve(recipe(tmp_path / "source", model={"image": {"norm": "frozen"}}))
    tokens = load_tokenizer("clip", 12)
    model = model_of(made, tokens)
    check(model, tokens, theirs)
    export = saved(model, portable(made), tmp_path / "export")  # which does not say that it began elsewhere
    with torch.no_grad():
        want = model.eval()(images=(pictures(),))["image"]
        assert load_model(str(export)).model(images=(pictures(),))["image"].equal(want)
        as_transformers.write(export)
        from transformers import AutoModel

        got = AutoModel.from_pretrained(str(export)).eval().get_image_features(pictures())
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def saved(model, config, run):
    """As the folder of a run, or an export, has it."""
    from safetensors.torch import save_file

    run.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, run / "weights.safetensors")
    (run / "config.yaml").write_text(dump(config))
    load_tokenizer("clip", 12).save(run / "tokenizer")
    save_architectures(model, run)
    return run


def test_an_export_says_what_was_built(tmp_path):
    """Towers of two architectures, at another size than theirs; what open_clip has no place for is refused by name."""
    import open_clip

    folder(tmp_path / "one", vision_cfg={**VISION, "image_size": 64})
    folder(tmp_path / "two", text_cfg={**NARROW, "heads": 4, "width": 8})
    folder(tmp_path / "three", quick_gelu=False)
    names = {"image": {"name": f"open_clip/{tmp_path}/one"}, "text": {"name": f"open_clip/{tmp_path}/two"}}
    data = {"tokenizer": "clip", "context_length": 12, "image_size": 32}
    bare = {"projection": "none"}

    def made(text: str = "two", head: str = "none"):
        sides = {side: {**bare, **section} for side, section in names.items()}
        sides["text"]["name"], sides["image"]["projection"] = f"open_clip/{tmp_path}/{text}", head
        return build({"train": {"samples": 256}, "data": data, "model": {"embedding_width": 8, **sides}})

    tokens, config = load_tokenizer("clip", 12), made()
    model = model_of(config, tokens)
    run = saved(model, config, tmp_path / "run")
    as_open_clip.write(run)
    check(model, tokens, open_clip.create_model(f"local-dir:{run}", load_weights=True, weights_only=True).eval())
    for number, (other, said) in enumerate((
        (made(head="linear"), r"^--to open_clip: model.image.projection: expected none, .* got linear"),
        (made("three"), r"^--to open_clip: model.text.name: expected an architecture with quick_gelu True, as open_cl"),
    )):  # fmt: skip
        run = saved(model_of(other, tokens), other, tmp_path / f"run{number}")
        with pytest.raises(UserError, match=said):
            as_open_clip.write(run)
