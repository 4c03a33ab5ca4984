"""Text towers by name: our small transformer, and transformers' models, from a type or a local folder.

A tower of one's own is a `TokenTower` and an entry in TEXT_TOWERS, as in tests/commands/additions/tower.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from amclr_scale.config.schema import TextTower
from amclr_scale.encoders.kinds import kind_of
from amclr_scale.encoders.libraries import open_clip_towers
from amclr_scale.encoders.libraries.transformers_parts import lacks, pretrained_model, random_model, read_config
from amclr_scale.encoders.small_transformer import SmallTransformer
from amclr_scale.encoders.trial import UntriedError, largest, trial
from amclr_scale.errors import UserError

Pooling = Literal["mean", "first", "last", "model"]

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
        self.filled = bool(getattr(tokens, "filled", False))

    def lengths(self, ids: Tensor) -> Tensor:
        """(b,) int64: how many tokens of each of these captions, on the host, make a difference: the others pad it."""
        if self.filled:
            return torch.full((len(ids),), ids.shape[1])
        last = ((ids != self.pad_id) * torch.arange(ids.shape[1])).amax(1)
        return (last + 1 + self.ends_with_pad).clamp(max=ids.shape[1])

    def forward(self, ids: Tensor, with_tokens: bool = False) -> Any:
        """(b, width); `with_tokens` also the features of tokens (b, n, width), and which of them count (b, n)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        last = ((ids != self.pad_id) * places).amax(1)  # (b,); 0 also in a caption without words
        visible = places <= (last + self.ends_with_pad)[:, None]  # (b, L)
        if ids.device.type == "cpu" and not self.filled:  # elsewhere the answer would have to be waited for
            longest = int(visible.any(0).sum())
            ids, visible = ids[:, :longest], visible[:, :longest]
        if self.pooling == "model":
            pooled, features = self.tokens(ids, visible, True) if with_tokens else (self.tokens(ids, visible), None)
        else:
            features = self.tokens(ids, visible)
            pooled = pool(features, visible, self.pooling)
        return (pooled, features, visible) if with_tokens else pooled


class TransformersModel(nn.Module):
    """A model of the transformers library with the calling convention of ours.

    Args:
        pools: give one feature for each caption, as the model makes it by itself.

    Attributes:
        filled: padding counts, as captions were always filled up in the model's training.
    """

    def __init__(self, model: Any, *, pools: bool = False):
        super().__init__()
        self.model, self.pools = model, pools
        self.filled = pools and "siglip" in model.config.model_type

    def forward(self, ids: Tensor, visible: Tensor, with_tokens: bool = False) -> Any:
        """Features of tokens (b, L, width); where the model pools, of captions (b, width), `with_tokens` too."""
        out = self.model(input_ids=ids, attention_mask=None if self.filled else visible.long())
        if not self.pools:
            return out.last_hidden_state
        return (out.pooler_output, out.last_hidden_state) if with_tokens else out.pooler_output


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
    if pooling == "model" and not getattr(made.tokens, "pools", False):
        raise UserError(f"model.text.pooling: {tower.name} does not pool by itself; choose mean, first or last")
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
    config = read_config(name, "text", captions.architecture)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # keys and values of earlier tokens, for generating; a recomputed block adds its own
    _fit(config, tower, captions)
    width, pools = _try(config, tower, captions), tower.pooling == "model"
    model = _pretrained(config, name, pools) if tower.pretrained and captions.weights else random_model(config, "text")
    if getattr(model, "pooler", None) is not None and not pools:
        model.pooler = None  # a head for next-sentence prediction, which would never get a gradient
    return TokenTower(TransformersModel(model, pools=pools), width, _pooling(config))


def _open_clip(tower: TextTower, captions: Captions) -> TokenTower:
    if tower.pooling not in ("default", "model"):
        raise UserError(f"model.text.pooling: expected model for {tower.name}, which pools itself, got {tower.pooling}")
    name = tower.name.partition("/")[2]
    return TokenTower(
        *open_clip_towers.text_tower(name, captions.vocab_size, captions.context_length, captions.architecture), "model"
    )


def _pretrained(config: Any, name: str, pools: bool) -> Any:
    model, missing = pretrained_model(config, name, "text")
    if wanted := [key for key in missing if pools or not key.startswith("pooler.")]:
        raise lacks(name, "text", wanted)
    return model


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
        # Causal, or trained without a mask: the number for padding says nothing, and is often wrong.
        indifferent = any(kind in config.model_type for kind in ("clip", "siglip"))
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
    pools = tower.pooling == "model"
    word = int(captions.pad_id == 0)  # any number but padding's
    if tower.pretrained:
        positions = None  # as many as the weights have
    if positions is not None:
        config.max_position_embeddings = positions = max(positions, length)
    found = _width(config, word, length, pools)
    if isinstance(found, int):
        return found
    longest = largest(lambda shorter: isinstance(_width(config, word, shorter, pools), int), length)
    if not longest:
        why = f"{type(found).__name__}: {found}".splitlines()[0]
        raise UserError(f"model.text.name: {tower.name} cannot be used as a text tower: {why}")
    if positions is not None:
        config.max_position_embeddings = positions + length - longest
        found = _width(config, word, length, pools)
        if isinstance(found, int):
            return found
    raise UserError(f"data.context_length: expected at most {longest} for {tower.name}, got {length}")


def _width(config: Any, word: int, length: int, pools: bool) -> int | Exception:
    """The width of the features of a caption of so many words, or why there are none."""
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # transformers loads models where nothing has memory
        ids = torch.full((2, length), word)
        with init_empty_weights(include_buffers=False):
            sketch = TransformersModel(random_model(config, "text"), pools=pools)
        try:
            try:
                features = trial(sketch, ids, torch.ones_like(ids, dtype=torch.bool))
            except UntriedError:  # it looks at numbers: then with weights
                sketch = TransformersModel(random_model(config, "text"), pools=pools)
                features = trial(sketch, ids, torch.ones_like(ids, dtype=torch.bool))
        except UntriedError:  # nothing has memory here
            return int(config.hidden_size)
        except Exception as error:  # whatever a model raises about what it cannot take
            return error
    expected = ids.shape[:1] if pools else ids.shape
    if not isinstance(features, Tensor) or features.shape[:-1] != expected:
        what = "caption" if pools else "token"
        return TypeError(f"expected a feature for each {what}, got {getattr(features, 'shape', type(features))}")
    return int(features.shape[-1])


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
    "open_clip/NAME": _open_clip,
}
