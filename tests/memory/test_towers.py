"""Every family of towers can be traced at every ZeRO stage, and what stage 3 gathers is what a run gathers."""

import pytest

from amclr_scale.config.load import load
from amclr_scale.memory.account import account
from amclr_scale.memory.towers import trace
from amclr_scale.torchvision_ops import import_torchvision
from tests.memory.test_measure import WORDS, _train

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT_TOWERS = {  # those that docs/encoders.md names, and one of each further kind: rotary, shared, relative positions
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "bert": SIZES,
    "roberta": SIZES,
    "clip_text_model": SIZES,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "qwen3": {**SIZES, "num_key_value_heads": 1, "head_dim": 16},
    "albert": {**SIZES, "embedding_size": 16},
    "mpnet": SIZES,
    "deberta-v2": SIZES,
}


def text_tower(folder, kind: str) -> list[str]:
    """The words that choose a small tower of a family, which is written into a folder."""
    import_torchvision()
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **TEXT_TOWERS[kind]).save_pretrained(folder)
    return [f"model.text.name=transformers/{folder}", "model.text.pooling=mean"]


@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_text_towers_at_every_stage(tmp_path, kind):
    """Also with recomputation: a causal tower must not add to the keys and values of its first forward."""
    words = [*WORDS, "train.global_batch_size=64", *text_tower(tmp_path, kind)]
    found = {}
    for recomputation in ("none", "full"):
        given = load(None, [*words, f"execution.recompute_text={recomputation}"], 2)
        found[recomputation] = trace(given, "text", "cpu").with_graph.kept(8)
        assert trace(given, "text", "cpu", partitioned=True).with_graph.visits
    assert 0 < found["full"] < found["none"]
    for stage in range(4):
        given = load(None, [*words, f"execution.zero_stage={stage}"], 2)
        assert account(given, world_size=2, num_samples=4096, device="cpu").peak_bytes > 0


def test_attention_that_reads_the_weight_of_a_child():
    """torch's own hands its projection's weight to a function."""
    words = ["model.image.name=torchvision/vit_b_16", "data.image_size=32", "train.epochs=1"]
    whole, cut = (trace(load(None, words, 1), "image", "cpu", partitioned=partitioned) for partitioned in (False, True))
    assert cut.flops == whole.flops


def test_a_parameter_that_another_module_reads_is_measured_as_predicted(ranks, tmp_path):
    """CLIP's embeddings ask their child for the shape of its weight: stage 3 gathers it for both."""
    words = [*WORDS, *text_tower(tmp_path, "clip_text_model"), "execution.zero_stage=3", "execution.micro_batch_size=8"]
    words += ["train.global_batch_size=64", "deepspeed.zero_optimization.stage3_param_persistence_threshold=100"]
    predicted = account(load(None, words, 2), world_size=2, num_samples=4096, device="cpu")
    _, peaks, _ = ranks(2, _train, words, 2, True)[0]
    for phase in predicted.phases:
        assert predicted.by_phase[phase] == pytest.approx(peaks[phase][0], rel=0.03), phase
