"""Text towers by name: our small transformer, and transformers' models, from a type or a local folder.

The hub is never asked: a name that is neither a known type nor a folder is an error at once. A tower of one's own is a
`TokenTower` and an entry in TEXT_TOWERS, as in tests/commands/additions/tower.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from amclr_scale.config.schema import TextTower
from amclr_scale.encoders.kinds import kind_of
from amclr_scale.encoders.small_transformer import SmallTransformer
from amclr_scale.encoders.trial import UntriedError, largest, trial
from amclr_scale.errors import UserError, did_you_mean
from amclr_scale.torchvision_ops import import_torchvision

Pooling = Literal["mean", "first", "last"]

FIRST = ("bert", "electra", "mpnet", "ernie", "deberta")  # a classification token in front
LAST = ("clip", "gpt", "opt", "llama", "mistral", "qwen", "gemma", "phi")  # causal: the last token has seen the others


class PooledTower(nn.Module):
    """Token ids (b, L) -> (b, width), from a module that gives a feature for each token. Padding does not count.

    Padding is what follows the last token that is not `pad_id`: the same number inside a caption is a word (CLIP pads
    with the number of "!"). Where the end token itself pads, `ends_with_pad`, the first of them is the caption's.
    """

    def __init__(self, tokens: nn.Module, pad_id: int, pooling: Pooling, *, ends_with_pad: bool = False):
        super().__init__()
        self.tokens, self.pad_id, self.pooling, self.ends_with_pad = tokens, pad_id, pooling, ends_with_pad

    def forward(self, ids: Tensor, with_tokens: bool = False) -> Any:
        """(b, width); `with_tokens` also the features of tokens (b, n, width), and which of them count (b, n)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        last = ((ids != self.pad_id) * places).amax(1)  # (b,); 0 also in a caption without words
        visible = places <= (last + self.ends_with_pad)[:, None]  # (b, L)
        if ids.device.type == "cpu":  # elsewhere the answer would have to be waited for
            longest = int(visible.any(0).sum())
            ids, visible = ids[:, :longest], visible[:, :longest]
        features = self.tokens(ids, visible)
        pooled = pool(features, visible, self.pooling)
        return (pooled, features, visible) if with_tokens else pooled


class TransformersModel(nn.Module):
    """A model of the transformers library with the calling convention of ours."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, visible: Tensor) -> Tensor:
        return cast(Tensor, self.model(input_ids=ids, attention_mask=visible.long()).last_hidden_state)


def pool(features: Tensor, visible: Tensor, pooling: Pooling) -> Tensor:
    """(b, L, width) -> (b, width): the mean over visible tokens, the first one, or the last visible one."""
    if pooling == "first":
        return features[:, 0]
    if pooling == "last":
        return features[torch.arange(len(features), device=features.device), visible.sum(1) - 1]
    weights = visible[:, :, None].to(features.dtype)
    return (features * weights).sum(1) / weights.sum(1)


@dataclass(frozen=True)
class Captions:
    """What a tower is to read: token ids (b, L).

    Attributes:
        vocab_size, pad_id: the tokenizer's.
        context_length: L.
        weights: whether trained weights are loaded where the section names some.
        architecture: of a model of transformers, instead of the one that its name says.
    """

    vocab_size: int
    pad_id: int
    context_length: int
    weights: bool = True
    architecture: dict[str, Any] | None = None


@dataclass(frozen=True)
class TokenTower:
    """A tower before its pooling.

    Attributes:
        tokens: token ids (b, L) and which of them are words, (b, L) bool -> features (b, L, width).
        pooling: how features become one, where the section does not say; None: it has to.
    """

    tokens: nn.Module
    width: int
    pooling: Pooling | None


def build_text_tower(
    tower: TextTower,
    *,
    vocab_size: int,
    pad_id: int,
    end_id: int | None,
    context_length: int,
    weights: bool = True,
    architecture: dict[str, Any] | None = None,
) -> tuple[nn.Module, int]:
    """(b, L) -> (b, width): the tower, and its width.

    Args:
        architecture: of a model of transformers, instead of the one that its name says.

    Raises:
        UserError: an unknown name, a hub name, a tokenizer or context that does not fit, weights that do not load.
    """
    build = kind_of(tower.name, TEXT_TOWERS, "model.text.name")
    made = build(tower, Captions(vocab_size, pad_id, context_length, weights, architecture))
    pooling = made.pooling if tower.pooling == "default" else tower.pooling
    if pooling is None:
        raise UserError(f"model.text.pooling: no default for {tower.name}; choose mean, first or last")
    return PooledTower(made.tokens, pad_id, pooling, ends_with_pad=end_id == pad_id), made.width


def _small_transformer(tower: TextTower, captions: Captions) -> TokenTower:
    if tower.width % tower.heads:
        raise UserError(f"model.text.heads: expected a divisor of model.text.width = {tower.width}, got {tower.heads}")
    tokens = SmallTransformer(
        tower.width, tower.layers, tower.heads, vocab_size=captions.vocab_size,
        context_length=captions.context_length, dropout=tower.dropout,
    )  # fmt: skip
    return TokenTower(tokens, tower.width, "mean")


def _transformers(tower: TextTower, captions: Captions) -> TokenTower:
    name = tower.name.partition("/")[2]
    config = _config(name, captions.architecture)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # keys and values of earlier tokens, for generating; a recomputed block adds its own
    _fit(config, tower, captions)
    width = _try(config, tower, captions)
    model = _pretrained(config, name) if tower.pretrained and captions.weights else _random(config)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # a head for next-sentence prediction, which would never get a gradient
    return TokenTower(TransformersModel(model), width, _pooling(config))


def save_architecture(tower: nn.Module, folder: Path) -> None:
    """Write the config.json of a model of transformers into a folder; of other towers nothing."""
    tokens = getattr(tower, "tokens", None)
    if isinstance(tokens, TransformersModel):
        inner: Any = tokens.model
        inner.config.save_pretrained(folder)


def _config(name: str, architecture: dict[str, Any] | None) -> Any:
    try:
        import_torchvision()
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        raise UserError(
            f"model.text.name: transformers/{name} needs transformers: pip install transformers ({error})"
        ) from error
    if architecture is not None:
        return CONFIG_MAPPING[architecture["model_type"]].from_dict(architecture).get_text_config()
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(
                f"model.text.name: the folder {name} has no config.json; expected one saved by transformers"
            )
        try:
            found = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().partition("\n")[0]
            raise UserError(
                f"model.text.name: {name}/config.json is none that transformers reads without code of the folder's "
                f"own, which is never run: {first}"
            ) from error
        return found.get_text_config()
    types = list(CONFIG_MAPPING.keys())
    if name not in types:
        raise UserError(
            f"model.text.name: expected a local folder or a type of transformers, got {name}, which is neither"
            f"{did_you_mean(name, types, 3)}. Nothing is downloaded: fetch a model of "
            f"the hub beforehand (hf download {name} --local-dir FOLDER) and name it transformers/FOLDER"
        )
    return AutoConfig.for_model(name).get_text_config()


def _fit(config: Any, tower: TextTower, captions: Captions) -> None:
    """Give the configuration our tokenizer's vocabulary, or refuse where trained weights have another."""
    vocab_size, pad_id = captions.vocab_size, captions.pad_id
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model.text.name: {config.model_type} has a decoder; choose an encoder, such as transformers/distilbert"
        )
    if tower.pretrained:
        if vocab_size > config.vocab_size:
            raise UserError(
                f"data.tokenizer: its {vocab_size} words do not fit the {config.vocab_size} of {tower.name}; use the "
                "tokenizer in that folder"
            )
        indifferent = "clip" in config.model_type  # causal: its number for padding says nothing, and is often wrong
        if config.pad_token_id is not None and config.pad_token_id != pad_id and not indifferent:
            raise UserError(
                f"data.tokenizer: pads with {pad_id}, and {tower.name} was trained with {config.pad_token_id}; use the "
                "tokenizer in that folder"
            )
        return
    config.vocab_size, config.pad_token_id = vocab_size, pad_id
    for token in ("bos_token_id", "eos_token_id"):
        if (getattr(config, token, None) or 0) >= vocab_size:
            setattr(config, token, pad_id)  # the default vocabulary's; our own tokenizer puts these tokens itself


def _try(config: Any, tower: TextTower, captions: Captions) -> int:
    """The width of a model's features, from a forward of a caption as long as captions may be.

    A model with random weights gets as many positions as that takes: some are for padding, or for nothing.

    Raises:
        UserError: the caption is too long for trained weights, or the model is no text tower.
    """
    length, positions = captions.context_length, getattr(config, "max_position_embeddings", None)
    word = int(captions.pad_id == 0)  # any number but padding's
    if tower.pretrained:
        positions = None  # as many as the weights have
    if positions is not None:
        config.max_position_embeddings = positions = max(positions, length)
    found = _width(config, word, length)
    if isinstance(found, int):
        return found
    longest = largest(lambda shorter: isinstance(_width(config, word, shorter), int), length)
    if not longest:
        why = f"{type(found).__name__}: {found}".splitlines()[0]
        raise UserError(f"model.text.name: {tower.name} cannot be used as a text tower: {why}")
    if positions is not None:
        config.max_position_embeddings = positions + length - longest
        found = _width(config, word, length)
        if isinstance(found, int):
            return found
    raise UserError(f"data.context_length: expected at most {longest} for {tower.name}, got {length}")


def _width(config: Any, word: int, length: int) -> int | Exception:
    """The width of the features of a caption of so many words, or why there are none."""
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # transformers loads models where nothing has memory
        ids = torch.full((2, length), word)
        with init_empty_weights(include_buffers=False):
            sketch = TransformersModel(_random(config))
        try:
            try:
                features = trial(sketch, ids, torch.ones_like(ids, dtype=torch.bool))
            except UntriedError:  # it looks at numbers: then with weights
                sketch = TransformersModel(_random(config))
                features = trial(sketch, ids, torch.ones_like(ids, dtype=torch.bool))
        except UntriedError:  # nothing has memory here
            return int(config.hidden_size)
        except Exception as error:  # whatever a model raises about what it cannot take
            return error
    if not isinstance(features, Tensor) or features.shape[:2] != ids.shape:
        return TypeError(f"expected a feature for each token, got {getattr(features, 'shape', type(features))}")
    return int(features.shape[-1])


def _random(config: Any) -> Any:
    from transformers import AutoModel

    try:
        return AutoModel.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"model.text.name: transformers has no text model of type {config.model_type}") from error


def _pretrained(config: Any, name: str) -> Any:
    from transformers import AutoModel

    if not Path(name).is_dir():
        raise UserError(f"model.text.pretrained: expected a local folder in model.text.name, got the type {name}")
    try:
        model, report = AutoModel.from_pretrained(
            name, config=config, local_files_only=True, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.text.name: the weights in {name} cannot be loaded: {error}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"model.text.name: {name} lacks {len(missing)} weights of its text model ({', '.join(missing[:3])})"
        )
    return model


def _pooling(config: Any) -> Pooling | None:
    kind = config.model_type
    if getattr(config, "use_bidirectional_attention", False):  # made from a causal one, for embeddings
        return "mean"
    if any(part in kind for part in LAST):
        return "last"
    if any(part in kind for part in FIRST):
        return "first"
    return None


# By name, or by KIND/NAME for a library's.
TEXT_TOWERS: dict[str, Callable[[TextTower, Captions], TokenTower]] = {
    "small_transformer": _small_transformer,
    "transformers/NAME": _transformers,
}
