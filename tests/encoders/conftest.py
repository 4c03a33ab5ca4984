"""Small versions of transformers' text models, so that building one costs milliseconds."""

import pytest


@pytest.fixture
def small_transformers(monkeypatch):
    """Every default configuration of transformers becomes narrow and shallow while a test runs."""
    from amclr_scale.torchvision_ops import import_torchvision

    import_torchvision()
    from transformers import AutoConfig

    plain = AutoConfig.for_model

    def small(kind, **options):
        config = plain(kind, **options).get_text_config()
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "hidden_dim": 48,
        }
        for key, value in sizes.items():
            if hasattr(config, key):
                setattr(config, key, value)
        return config

    monkeypatch.setattr(AutoConfig, "for_model", staticmethod(small))
