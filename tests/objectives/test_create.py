"""Objectives by name: the table, its errors, and options that can be read without importing anything."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from amclr_scale import objectives
from amclr_scale.config.objective_options import option_models
from amclr_scale.objectives.base import Objective
from amclr_scale.objectives.staging import staged
from tests.objectives.harness import global_batch, make, my_rows

NAMES = [
    "amclr", "amclr_dro", "amorlip", "barlip", "byolip", "cacr", "clip", "count", "cwcl", "cyclip", "dcl", "dclw",
    "debiased", "decoupled", "degla", "distill", "drrho", "fastclip", "fifo_bank", "filip", "full_bank", "gram",
    "isogclr", "isogclr_net", "m2_mixup", "m3col", "meow", "mochi", "momentum_queue", "negclip", "neuclip", "one_to_k",
    "onlineclr", "pamc", "rankclip", "scent", "siamlip", "siglip", "siglip_plus", "simclr", "slip", "sogclr", "supcon",
    "swav", "uniformity", "vicreg", "vrns", "xamclr", "xamclr_dro",
]  # fmt: skip
EVERYTHING = {"views": 2, "negatives": 4, "heads": True, "tokens": True}  # what any of them reads
OF_TOKENS = ("filip",)  # and of nothing else


def test_the_table_names_every_objective_with_a_line_and_its_options():
    found = objectives.available()
    assert list(found) == NAMES
    for name, description in found.items():
        assert 20 < len(description.summary) < 120, name
    assert found["sogclr"].options["num_samples"] is ...
    assert found["sogclr"].options["temperature"] == 0.07


@pytest.mark.parametrize("name", NAMES)
def test_options_read_from_source_are_those_of_the_class(name):
    """The configuration reads Config classes without importing them; both readings must agree."""
    read = {key: field.default for key, field in option_models()[name].model_fields.items()}
    declared = {f.name: f.default for f in dataclasses.fields(Objective.registry[name].Config)}
    declared.pop("num_samples", None)
    assert read == declared


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_takes_num_samples_and_gives_finite_gradients(name):
    objective = objectives.create(name, num_samples=20, sample_state="replicated")
    e = my_rows(global_batch(0, **EVERYTHING))
    loss = objective(e)
    loss.value.backward()
    assert loss.value.shape == ()
    image, text = (getattr(e, f"{side}_tokens" if name in OF_TOKENS else side) for side in ("image", "text"))
    assert image.grad.isfinite().all()
    assert (image if name == "simclr" else text).grad.abs().max() > 0 or name == "full_bank"
    assert all(type(value) is float for value in loss.metrics.values())
    assert math.isfinite(loss.metrics["objective"])
    keeps = hasattr(objective, "image_state") or hasattr(objective, "bank")
    assert ("ids" in objective.inputs) == (keeps or getattr(objective.config, "positives", "") == "image")


STATE = {"clip": {"queue": {"size": 16}}, "fifo_bank": {"size": 16}}
STATE["momentum_queue"] = {"size": 16, "alpha_ramp_samples": 99}


def test_only_a_step_that_is_applied_leaves_a_trace():
    """What it leaves in a plain loop, to the last bit; looks without gradients and in evaluation leave none."""

    def step(objective, number):
        objective(my_rows(global_batch(number, **EVERYTHING))).value.backward()

    seen = set()
    for name in NAMES:
        waiting, plain = make(name, **STATE.get(name, {})), make(name, **STATE.get(name, {}))
        with staged() as commit:
            step(waiting, 0)
            commit()
        state = {key: value.clone() for key, value in waiting.state_dict().items()}
        if not state:
            continue
        seen.add(name)
        step(plain, 0)
        with staged():
            step(waiting, 1)
        with torch.no_grad():
            waiting(my_rows(global_batch(2, **EVERYTHING)))
        step(waiting.eval(), 3)
        for found in (waiting.state_dict(), plain.state_dict()):
            assert found.keys() == state.keys(), name
            assert all(torch.equal(found[key], value) for key, value in state.items()), name
    assert {*STATE, "sogclr", "xamclr", "isogclr", "full_bank", "onlineclr"} <= seen


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: objectives.create("sogcrl"), "name: no objective is called 'sogcrl'; did you mean 'sogclr'"),
        (lambda: objectives.create("zzz"), "name: no objective is called 'zzz'; known: amclr, "),
        (lambda: make("sogclr", temprature=0.1), "temprature: sogclr has no such option; did you mean 'temperature'"),
        (lambda: objectives.create("sogclr"), "num_samples: sogclr needs it, got nothing"),
        (lambda: make("sogclr", temperature="hot"), "temperature: expected float, got 'hot'"),
        (lambda: make("clip", temperature="hot"), "temperature: expected float or None, got 'hot'"),
        (lambda: make("sogclr", margin=math.nan), "margin: expected float, got nan"),
        (lambda: make("isogclr", temperature=0.07), r"temperature: expected a number from temperature_min 0\.005 to"),
        (lambda: make("xamclr_dro", temperature=0.001), "temperature: expected a number from temperature_min"),
        (lambda: make("fastclip", version="v2", temperature=5), "temperature: expected a number from temperature_min"),
        (
            lambda: make("fastclip", version="v2", temperature_min=0.04),
            r"temperature: .* from temperature_min 0\.04 .*03;",
        ),
        (lambda: make("fastclip", temperature_lr=-1), "temperature_lr: expected a step size of at least 0"),
        (lambda: make("isogclr", eta_min=-1), "eta_min: expected a step size of at least 0"),
        *(
            (lambda name=name: make(name, rho=-1), "rho: expected a divergence of at least 0, got -1")
            for name in ("isogclr", "isogclr_net", "amclr_dro", "xamclr_dro", "fastclip")
        ),
        (lambda: make("amclr", reduce="some"), "reduce: expected 'mean' or 'sum', got 'some'"),
        (lambda: make("amclr", omega=1.5), r"omega: expected int, got 1\.5"),
        (lambda: make("cyclip", inmodal=1), "inmodal: expected bool, got 1"),
        (lambda: make("sogclr", sample_state="both"), "sample_state: expected 'auto', 'replicated' or 'sharded'"),
        (lambda: objectives.create("sogclr", num_samples=0), "num_samples: expected the size of the data set, got 0"),
    ],
)
def test_mistakes_are_answered_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_whole_numbers_are_numbers():
    assert make("clip", temperature=1).config.temperature == 1.0


def test_one_pair_has_no_negatives():
    e = my_rows(global_batch(0))
    alone = dataclasses.replace(e, image=e.image[:1], text=e.text[:1], ids=e.ids[:1])
    for name, options in (("sogclr", {}), ("sogclr", {"surrogate": "squared_hinge"}), ("dcl", {}), ("vicreg", {})):
        with pytest.raises(ValueError, match="expected at least 2 samples"):
            make(name, **options)(alone)


def test_views_must_have_the_shape_of_their_modality():
    e = global_batch(0, views=1)
    with pytest.raises(ValueError, match=r"embeddings\.text_views: expected every view to have the shape"):
        make("amclr")(dataclasses.replace(e, text_views=(e.text_views[0][:4],)))
    with pytest.raises(ValueError, match=r"embeddings\.image, embeddings\.text: expected two of one shape"):
        make("clip")(dataclasses.replace(e, text=e.text[:4]))


HINGED = [(name, {"surrogate": "squared_hinge"}) for name in ("sogclr", "isogclr")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: {"text": e.text.detach().long()},
            r"embeddings\.text: expected floating-point .* got torch\.int64 on cpu",
        ),
        (lambda e: {"text": e.text.to("meta")}, r"embeddings\.text: expected .* of the images \(cpu\), got .* on meta"),
        (lambda e: {"text": 5 * e.text}, r"embeddings\.text: clip expects rows of length 1, got one of length 5"),
        (
            lambda e: {"image": 0.9 * e.image},
            r"embeddings\.image: clip expects rows of length 1, got one of length 0\.9",
        ),
        (lambda e: {"logit_scale": torch.ones(8)}, r"embeddings\.logit_scale: expected one number, .* got \(8,\)"),
    ],
)
def test_embeddings_that_cannot_be_are_answered_in_words(change, message):
    e = global_batch(0)
    with pytest.raises(ValueError, match=message):
        make("clip")(dataclasses.replace(e, **change(e)))


def test_lengths_are_for_objectives_that_need_them():
    """Zeros are what normalising a dead tower's output gives, and not a mistake of the loop; VICReg wants lengths."""
    e = global_batch(0)
    dead = make("clip")(dataclasses.replace(e, image=torch.zeros_like(e.image)))
    assert dead.value.item() == pytest.approx(math.log(len(e.image)))  # every pair is as likely
    assert make("clip")(dataclasses.replace(e, text=e.text.to(torch.bfloat16))).value.isfinite()
    longer = make("vicreg")(dataclasses.replace(e, image=5 * e.image))
    assert longer.value > make("vicreg")(e).value  # images and texts are further apart


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NAMES), *HINGED])
def test_bf16_embeddings_give_float32_arithmetic(name, options):
    """The numbers from bf16 embeddings are those of their float32 copies: nothing is computed in bf16."""
    e = global_batch(0, **EVERYTHING)
    sides = ("image_tokens", "text_tokens") if name in OF_TOKENS else ("image", "text")
    half = {}
    for kind in (torch.bfloat16, torch.float32):

        def changed(name, x, kind=kind):
            rows = name.partition(".")[0] in (*sides, "image_views", "text_views", "text_negatives")
            x = x.detach().bfloat16().to(kind) if rows else x.detach().float() if x.is_floating_point() else x
            return x.requires_grad_(name in sides)

        half[kind] = e.map(changed)
    losses = {kind: make(name, **options)(x) for kind, x in half.items()}
    values = {kind: loss.value for kind, loss in losses.items()}
    torch.testing.assert_close(values[torch.bfloat16].float(), values[torch.float32].float(), rtol=1e-5, atol=1e-6)
    objective = {kind: loss.metrics["objective"] for kind, loss in losses.items()}  # a first step's value is constant
    assert objective[torch.bfloat16] == pytest.approx(objective[torch.float32], rel=1e-5)
    values[torch.bfloat16].backward()
    values[torch.float32].backward()
    got, want = (getattr(half[kind], sides[0]).grad for kind in (torch.bfloat16, torch.float32))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2 * want.abs().max().item())


@pytest.mark.launch
def test_the_package_imports_in_a_fresh_process_and_lists_itself():
    code = "from amclr_scale import objectives; print(*objectives.available())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == NAMES


def test_the_unit_rows_of_the_harness_are_unit_rows():
    e = global_batch(0, views=2)
    for x in (e.image, e.text, *e.image_views, *e.text_views):
        torch.testing.assert_close(x, F.normalize(x, dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_the_objective(name):
    values = []
    for enabled in (False, True):
        e = my_rows(global_batch(0, **EVERYTHING))
        single = e.map(lambda _, x: x.detach().float() if x.is_floating_point() else x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append(make(name)(single).value)
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=1e-7)


def test_metrics_wait_on_the_device_until_one_is_read_and_keep_their_values():
    from amclr_scale.objectives.base import numbers

    scale = torch.tensor([2.0])
    found = numbers(objective=scale, gamma=0.5, exact=torch.tensor(0.1, dtype=torch.float64))
    scale.fill_(7.0)  # an optimizer's step in between
    assert list(found) == ["objective", "gamma", "exact"]
    assert dict(found) == {"objective": 2.0, "gamma": 0.5, "exact": 0.1}
    assert all(type(value) is float for value in found.values())
