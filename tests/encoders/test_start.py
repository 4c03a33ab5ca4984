"""Starting from a whole dual encoder: every embedding is the source library's, and what contradicts it is refused."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file

import amclr_scale
from amclr_scale import objectives
from amclr_scale.commands.preview import preview
from amclr_scale.commands.train import arguments
from amclr_scale.config.load import build, dump
from amclr_scale.config.schema import ImageTower, Momentum
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.encoders.image_towers import IMAGE_TOWERS, build_image_tower
from amclr_scale.encoders.libraries.transformers_parts import save_architectures
from amclr_scale.encoders.start.taken import resolve
from amclr_scale.engine.build import model_of
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.teacher import Teacher
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.engine.zero.stage3_init import shape_only
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import load_model
from amclr_scale.evaluation.run import Evaluator
from amclr_scale.memory.towers import parameter_sizes
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Batch
from tests.engine.towers import CPU, config
from tests.evaluation.shards import picture, write_split, write_tar
from tests.evaluation.test_foreign import TEXTS, VISION, WORDS
from tests.evaluation.test_foreign import build as build_theirs

KINDS = ("clip", "siglip", "siglip2", "chinese_clip", "vision-text-dual-encoder")
LONG = " ".join(["a red house on the mat"] * 5)  # cut


def saved(kind: str, folder) -> tuple:
    """A tiny model with random weights and the learned numbers of a trained one, with what belongs to it."""
    model, words, processor, filled = build_theirs(kind)
    for name, value in (("logit_scale", 3.0), ("logit_bias", -7.5)):
        if hasattr(model, name):
            getattr(model, name).data.fill_(value)
    words.model_max_length = 16
    for part in (model.eval(), words, processor):
        part.save_pretrained(folder)
    return model, words, processor, filled


def recipe(init, **sections):
    tree = {"train": {"samples": 256}, **sections}
    return build({**tree, "model": {"init": str(init), **tree.get("model", {})}})


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_library_s(tmp_path, kind):
    theirs, words, processor, filled = saved(kind, tmp_path)
    config = resolve(recipe(tmp_path))
    tokens = load_tokenizer(config.data.tokenizer, config.data.context_length)
    model = model_of(config, tokens).eval()
    texts = [*TEXTS, LONG, ""]
    read = words(texts, padding="max_length" if filled else True, max_length=16, truncation=True, return_tensors="pt")
    given = {"input_ids": read["input_ids"]} if filled else {k: read[k] for k in ("input_ids", "attention_mask")}
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = processor(images=list(pictures), return_tensors="pt")
    with torch.no_grad():
        got = model(images=(pictures,), texts=(tokens(texts),))
        with_tokens = model(images=(pictures,), texts=(tokens(texts),), tokens=True)
        outs = {"image": theirs.get_image_features(**seen), "text": theirs.get_text_features(**given)}
    for side, out in outs.items():
        torch.testing.assert_close(got[side], F.normalize(out.pooler_output, dim=-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(got["logit_scale"], theirs.logit_scale.detach().exp().reshape(1))
    if filled:
        assert got["logit_bias"].item() == -7.5
    assert with_tokens["text"].equal(got["text"])
    assert with_tokens["text_tokens"].shape[:2] == (5, 16)
    assert with_tokens["image_tokens"].shape[1] in (4, 5)  # patches, and a class token
    assert (config.data.image_size, config.data.context_length) == (32, 16)
    assert model.notes[-1].startswith(
        f"model.init: {sum(p.numel() for p in model.state_dict().values()):,} weights from {tmp_path}, and "
    )
    assert resolve(build(yaml.safe_load(dump(config)))) == config  # as a run's config.yaml is read again


def test_what_contradicts_it_is_refused_by_name_in_one_answer(tmp_path):
    saved("clip", tmp_path)
    wrong = {"model": {"embedding_width": 8, "text": {"pooling": "mean"}}, "data": {"image_size": 64}}
    with pytest.raises(UserError) as told:
        resolve(recipe(tmp_path, **wrong))
    lines = str(told.value).splitlines()
    keys = ("model.embedding_width", "data.image_size", "model.text.pooling")
    assert [line.partition(": ")[0] for line in lines] == list(keys)
    assert "expected 16, as in model.init" in lines[0]
    assert "got 8; leave the key away" in lines[0]
    longer = {"data": {"context_length": 20}}
    with pytest.raises(UserError, match=r"^data.context_length: expected 16, as in model.init .* got 20"):
        resolve(recipe(tmp_path, **longer))
    with pytest.raises(UserError, match=r"^model.image.weights: expected null, as model.init brings all weights"):
        resolve(recipe(tmp_path, model={"image": {"weights": "x.pt"}}))
    # What the recipe has the last word of.
    config = resolve(
        recipe(tmp_path, model={"temperature": 0.07, "image": {"frozen": True}}, data={"context_length": 8})
    )
    assert (config.data.context_length, config.model.temperature) == (8, 0.07)
    model = model_of(config, load_tokenizer(config.data.tokenizer, 8))
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert any(note.startswith("model.init: logit_scale 2.65926 as the recipe says, 3 there") for note in model.notes)
    assert not any("random weights" in note for note in model.notes)


def test_captions_are_as_long_as_both_tokenizer_and_positions_allow(tmp_path):
    _, words, *_ = saved("clip", tmp_path)
    for said, length in ((12, 12), (40, 16)):
        words.model_max_length = said
        words.save_pretrained(tmp_path)
        assert resolve(recipe(tmp_path)).data.context_length == length


def test_what_is_no_dual_encoder_is_refused_by_name(tmp_path):
    saved("siglip", tmp_path)
    with pytest.raises(UserError, match=r"^data.context_length: expected 16, as in model.init .* got 8"):
        resolve(recipe(tmp_path, data={"context_length": 8}))  # its captions always fill the context
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"^model.init: expected a model of type clip, siglip, .* got bert in "):
        resolve(recipe(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"^model.init: expected a run or an export of ours, .* neither a config.yaml"):
        resolve(recipe(tmp_path))
    with pytest.raises(
        UserError, match=r"^model.init: .* or OWNER/NAME of the Hugging Face hub, got nowhere: which is"
    ):
        resolve(recipe("nowhere"))


def test_weights_of_another_model_are_refused(tmp_path):
    model, *_ = saved("clip", tmp_path)
    config = resolve(recipe(tmp_path))
    model.text_projection.weight.data = torch.zeros(16, 32)
    state = {name: value for name, value in model.state_dict().items() if "visual_projection" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"^model.init: .* lacks 1 weights of its model \(visual_projection.weight\)"):
        model_of(config, load_tokenizer(config.data.tokenizer, 16))


def test_a_run_or_an_export_of_ours(tmp_path):
    """The transformers towers of a run that began elsewhere are in its folder."""
    saved("clip", tmp_path / "clip")
    config = resolve(recipe(tmp_path / "clip", model={"momentum": {"decay": 0.9}}))
    tokens = load_tokenizer(config.data.tokenizer, 16)
    before = model_of(config, tokens).eval()
    with torch.no_grad():
        before.logit_scale.fill_(2.0)
        before.image_head[1].weight.mul_(1.5)
    run = tmp_path / "run"
    run.mkdir()
    save_file({name: value.contiguous() for name, value in before.state_dict().items()}, run / "weights.safetensors")
    (run / "config.yaml").write_text(dump(config))
    tokens.save(run / "tokenizer")
    save_architectures(before, run)
    shutil.rmtree(tmp_path / "clip")  # it is no longer needed
    again = resolve(recipe(run))
    assert again.model.temperature == pytest.approx(math.exp(-2))
    after = model_of(again, load_tokenizer(again.data.tokenizer, again.data.context_length)).eval()
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=0)
    assert amclr_scale.load(run).encode_text(TEXTS).equal(before(texts=(tokens(TEXTS),))["text"])
    with pytest.raises(
        UserError, match=r"^model.text.name: expected 'transformers/.*run/text_tower', as in model.init"
    ):
        resolve(recipe(run, model={"text": {"name": "small_transformer"}}))
    (run / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"^model.init: expected a run that has come to its end, or an export"):
        resolve(recipe(run))


def test_weights_that_cannot_be_read_are_told(tmp_path):
    saved("clip", tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"^model.init: the weights in .* cannot be read: damaged, or pointers of git"):
        resolve(recipe(tmp_path))


def test_a_run_whose_frozen_tower_had_batch_norm_can_be_trained_on(tmp_path, monkeypatch):
    """Frozen as a whole it asked for no norm; without, its statistics stay those that are stored."""

    def tower(section, size):
        parts = (torch.nn.Conv2d(3, 4, 8, 8), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
        return torch.nn.Sequential(*parts), 64

    monkeypatch.setitem(IMAGE_TOWERS, "convolution", tower)
    first = build({
        "train": {"samples": 256}, "data": {"image_size": 32},
        "model": {"image": {"name": "convolution", "frozen": True}},
    })  # fmt: skip
    tokens = load_tokenizer("emoji", first.data.context_length)
    begun = first.model_copy(update={"model": first.model.model_copy(update={"init": "elsewhere"})})
    before = model_of(begun, tokens, weights=False).eval()
    before.image_tower[1].running_var.fill_(4.0)
    save_file({name: x.contiguous() for name, x in before.state_dict().items()}, tmp_path / "weights.safetensors")
    (tmp_path / "config.yaml").write_text(dump(first))
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for frozen in (False, True):
        after = model_of(resolve(recipe(tmp_path, model={"image": {"frozen": frozen}})), tokens)
        with torch.no_grad():
            assert after(images=(pictures,))["image"].equal(before(images=(pictures,))["image"])


def test_vision_towers_by_themselves(tmp_path):
    """Of a whole dual encoder's folder, of one model's, and of a type with random weights."""
    whole, *_ = saved("siglip", tmp_path)
    from transformers import ViTConfig, ViTModel

    alone = ViTModel(ViTConfig(**VISION), add_pooling_layer=False).eval().half()
    alone.save_pretrained(tmp_path / "alone")
    pictures = torch.rand(3, 3, 32, 32)
    for place, theirs in ((tmp_path, whole.vision_model), (tmp_path / "alone", alone.float())):
        tower, width, *_ = build_image_tower(ImageTower(name=f"transformers/{place}", pretrained=True), 32)
        with torch.no_grad():
            out = theirs(pixel_values=pictures)
            got = tower.eval()(pictures)
        pooled = out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output
        torch.testing.assert_close(got, pooled, rtol=0, atol=1e-6)
        assert width == 32
        assert {p.dtype for p in tower.parameters()} == {torch.float32}
    with pytest.raises(UserError, match=r"^data.image_size: transformers/.* does not take images of 48 pixels"):
        build_image_tower(ImageTower(name=f"transformers/{tmp_path}", pretrained=True), 48)
    with pytest.raises(UserError, match=r"^model.image.pretrained: expected transformers/FOLDER in model.image.name"):
        build_image_tower(ImageTower(pretrained=True), 32)
    with pytest.raises(
        UserError, match=r"^model.image.name: expected a local folder or a type of transformers, got vti"
    ):
        build_image_tower(ImageTower(name="transformers/vti"), 32)


def trained(folder: str) -> dict[int, dict[str, torch.Tensor]]:
    """Weights after two steps on this rank's half of the batch, by ZeRO stage."""
    found = {}
    for stage in (0, 3):
        sections = {"text": {"frozen": True, "unfrozen_blocks": 1}}
        made = config(8, execution__zero_stage=stage, optimizer__name="sgd", optimizer__momentum=0.0,
                      optimizer__weight_decay=0.0, optimizer__max_grad_norm=0.0)  # fmt: skip
        start = resolve(recipe(folder, model=sections))
        with shape_only(stage, rank()):
            model = model_of(start, load_tokenizer(folder, 16), weights=stage < 3 or rank() == 0)
        engine, _ = build_engine(made, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
        teacher = Teacher(Momentum(decay=0.7), engine, precision="fp32", total_steps=2, lends=(), device=CPU)
        step = TrainStep(
            engine, objectives.create("clip"), micro_batch_sizes=(2, 2), device=CPU, phases=Phases(CPU), kept=1,
            teacher=teacher,
        )  # fmt: skip
        for number in range(2):
            step(batch(number, slice(4 * rank(), 4 * rank() + 4)), 0.05)
        average = {f"average {name}": value for name, value in teacher.saved().items()}
        found[stage] = {name: full_fp32(p).cpu() for name, p in model.named_parameters()} | average
        engine.destroy()
    return found


def batch(step: int, mine: slice = slice(None)) -> Batch:
    g = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=g, dtype=torch.uint8)
    texts = torch.randint(2, 14, (8, 16), generator=g)
    texts[:, 9:] = 1  # the end, which also pads
    return Batch(torch.arange(8)[mine], (images[mine],), (texts[mine],))


def test_training_from_it_is_the_library_s_own(tmp_path, ranks):
    """Two ranks, the gradient cache, a momentum encoder, all text blocks but the last one frozen."""
    theirs, _, processor, _ = saved("clip", tmp_path)
    found = ranks(2, trained, str(tmp_path))
    start = {name: p.clone() for name, p in theirs.named_parameters()}
    still = ("text_model.embeddings",)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    learning = [p for name, p in theirs.named_parameters() if not name.startswith(still)]
    average = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    for number in range(2):
        whole = batch(number)
        out = theirs(pixel_values=(whole.images[0] / 255 - mean) / std, input_ids=whole.texts[0])
        theirs.zero_grad()
        labels = torch.arange(8)
        loss = (F.cross_entropy(out.logits_per_image, labels) + F.cross_entropy(out.logits_per_text, labels)) / 2
        loss.backward()
        with torch.no_grad():
            for p in learning:
                p.sub_(0.05 * p.grad)
            for name, p in theirs.named_parameters():
                average[name] = 0.7 * average[name] + 0.3 * p
    names = {"vision_model.": "image_tower.model.", "text_model.": "text_tower.tokens.model."}
    names |= {"visual_projection.": "image_head.1.", "text_projection.": "text_head.1.", "logit_scale": "logit_scale"}
    for one in found:
        for stage, weights in one.items():
            for name, p in theirs.named_parameters():
                before = next(each for each in names if name.startswith(each))
                ours = names[before] + name.removeprefix(before)
                moved = (p - start[name]).norm()
                assert (weights[ours] - p.reshape(weights[ours].shape)).norm() <= 1e-4 * moved + 1e-6, (stage, name)
                assert moved == 0 if name.startswith(still) else moved > 0 or "k_proj.bias" in name, name
                if name != "logit_scale":
                    kept = weights[f"average {ours}"]
                    assert (kept - average[name]).norm() <= 1e-4 * moved + 1e-6, (stage, name)


def test_a_dry_run_lists_what_is_taken_and_counts_it(tmp_path):
    theirs, *_ = saved("clip", tmp_path / "clip")
    split = write_split(tmp_path / "split", 24)
    made = resolve(recipe(tmp_path / "clip", data={"train": str(split)}, train={"samples": 24, "global_batch_size": 8}))
    lines = "\n".join(preview(made, RankInfo(), arguments(["--dry-run"])))
    assert f"weights from {tmp_path / 'clip'}, and model.embedding_width=16, data.tokenizer=" in lines
    numbers = sum(p.numel() for p in theirs.parameters()) + 1  # and the bias, which CLIP has not
    assert f"{numbers:,} parameters" in lines
    assert sum(parameter_sizes(made)) == numbers


def test_it_measures_as_the_library_before_any_training(tmp_path):
    saved("clip", tmp_path / "clip")
    pairs = [{"png": picture(i, 32), "txt": f"{' '.join(WORDS[i % 7 : i % 7 + 1 + i % 5])}"} for i in range(24)]
    write_tar(tmp_path / "pairs.tar", pairs)
    made = resolve(recipe(tmp_path / "clip", evaluation={"splits": [str(tmp_path / "pairs.tar")]}))
    ours = Evaluator(made)(model_of(made, load_tokenizer(made.data.tokenizer, 16)))
    loaded = load_model(f"transformers/{tmp_path / 'clip'}")
    theirs = Evaluator(made, reading=loaded.reading)(loaded.model)
    assert ours == theirs
    assert 0 < next(share for name, share in ours.items() if name.endswith("image_to_text_R@10")) < 1
