"""Which parameters weight decay leaves alone: by what they do, in every library's towers."""

import pytest
import torch
from torch import nn

from amclr_scale.config.schema import TextTower
from amclr_scale.encoders.decay import by_pattern, exempt
from amclr_scale.encoders.text_towers import build_text_tower
from amclr_scale.torchvision_ops import import_torchvision

# All that is spared beside what has one dimension, by the ends of names.
SPARED = {
    "timm/vit_base_patch16_siglip_224": {"pos_embed", "attn_pool.latent"},
    "timm/vit_base_patch16_reg4_gap_256": {"pos_embed", "reg_token"},
    "timm/levit_128": {"attn.attention_biases", "attn_downsample.attention_biases"},
    "timm/tiny_vit_5m_224": {"attn.attention_biases"},
    "timm/swinv2_tiny_window8_256": {"attn.logit_scale", "cpb_mlp.*.weight"},
    "timm/samvit_base_patch16": {"pos_embed", "attn.rel_pos_h", "attn.rel_pos_w"},
    "timm/beit_base_patch16_224": {"cls_token", "attn.relative_position_bias_table"},
    "timm/fastvit_t8": {"layer_scale.gamma"},
    "timm/twins_pcpvt_small": {"pos_block.*.proj.*.weight"},
    "timm/nfnet_f0": {".gain"},
    "timm/convnext_tiny": set(),
    "torchvision/vit_b_16": {"class_token", "encoder.pos_embedding"},
    "torchvision/convnext_tiny": {"layer_scale"},
    "torchvision/swin_v2_t": {"attn.logit_scale"},
    "torchvision/maxvit_t": {"relative_position_bias_table"},
    "transformers/gpt2": {"wpe.weight"},
    "transformers/mpnet": {"position_embeddings.weight", "relative_attention_bias.weight"},
    "transformers/deberta-v2": {"position_embeddings.weight"},
    "transformers/bert": {"position_embeddings.weight", "token_type_embeddings.weight"},
    "transformers/distilbert": {"position_embeddings.weight"},
    "transformers/clip_text_model": {"position_embedding.weight"},
    "transformers/t5": {"relative_attention_bias.weight"},
    "small_transformer": {"positions.weight"},
}


def built(name: str) -> nn.Module:
    """Shapes without memory, inside another module as in a model."""
    library, _, rest = name.partition("/")
    import_torchvision()
    holder = nn.Module()
    with torch.device("meta"):
        if library == "timm":
            import timm

            holder.image_tower = timm.create_model(rest, pretrained=False, num_classes=0)
        elif library == "torchvision":
            import torchvision

            holder.image_tower = torchvision.models.get_model(rest, weights=None)
        elif rest == "t5":  # a decoder and no tower of ours; only its encoder is looked at
            from transformers import T5Config, T5EncoderModel

            holder.text_tower = T5EncoderModel(T5Config(num_layers=2, vocab_size=300))
        else:
            holder.text_tower, _ = build_text_tower(
                TextTower(name=name, width=16), vocab_size=300, pad_id=0, end_id=1, context_length=16
            )
    return holder


@pytest.mark.parametrize("name", SPARED)
def test_what_does_not_transform_is_spared_and_all_else_decays(name):
    model = built(name)
    spared, parameters = exempt(model), dict(model.named_parameters())
    assert {n for n, p in parameters.items() if p.dim() < 2} <= spared.keys()
    found = set(by_pattern({n: why for n, why in spared.items() if parameters[n].dim() > 1}))
    unexpected = {n for n in found if not any(n.endswith(end) for end in SPARED[name])}
    assert not unexpected
    assert not {end for end in SPARED[name] if not any(n.endswith(end) for n in found)}


def test_one_line_for_a_hundred_layers():
    found = by_pattern(exempt(built("timm/swinv2_tiny_window8_256")))
    assert found["image_tower.layers.*.blocks.*.attn.logit_scale"] == "the tower's own list"
    assert found["image_tower.layers.*.blocks.*.norm1.weight"] == "one dimension"
    assert len(found) < 60


class Layer(nn.Module):
    """A tower's layer of nobody's library."""

    def __init__(self):
        super().__init__()
        self.qkv, self.gain = nn.Parameter(torch.ones(12, 4)), nn.Parameter(torch.ones(4, 1, 1))
        self.query, self.rel_pos_bias = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(3, 5))
        self.norm, self.to_one = nn.LayerNorm((2, 3)), nn.Linear(4, 1)
        self.words, self.position_embed = nn.Embedding(9, 4), nn.Embedding(9, 4)


def test_layers_of_nobodys_library():
    found = exempt(Layer())
    assert found == {
        "gain": "one direction", "query": "token", "rel_pos_bias": "bias", "norm.weight": "norm", "norm.bias": "bias",
        "to_one.bias": "bias", "position_embed.weight": "position",
    }  # fmt: skip
