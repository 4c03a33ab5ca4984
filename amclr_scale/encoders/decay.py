"""Which parameters weight decay leaves alone, by what they do.

Weight decay shrinks what transforms activations: weights of linear and convolutional layers, and the table of words. It
would move everything else towards a point that means nothing: biases, also those of attention, gains of norms and
layers, positions, learned tokens and queries, temperatures. Names differ from library to library, so a parameter is
judged by the module that it belongs to, by its shape, and by its name only where these say nothing.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator

from torch import nn

_TRANSFORMS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_BIAS = re.compile(r"bias(es)?(?![a-z])")  # relative_position_bias_table, attention_biases
_PLACE = re.compile(r"(?<![a-z])(abs_|rel_)?(pos|position|positions|positional|wpe)(?![a-z])|pos_embed|position_embed")
_TOKEN = re.compile(r"(?<![a-z])(token|tokens|latent|latents|query|queries|probe|prompt|prompts)$")


def exempt(model: nn.Module) -> dict[str, str]:
    """Name -> why weight decay does not apply, in the model's order."""
    found: dict[str, str] = {}
    tables = {id(table): reason for module in model.modules() for table, reason in _tables(module)}
    for prefix, module in model.named_modules():
        listed = _listed(module) if module is not model else ()
        for name, _ in module.named_parameters():
            if any(fnmatch.fnmatch(name, pattern) for pattern in listed):
                found[_join(prefix, name)] = "the tower's own list"
        for name, parameter in module.named_parameters(recurse=False):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO's stage 3 keeps flat pieces
            reason = _reason(prefix, module, name, shape, tables)
            if reason is not None:
                found.setdefault(_join(prefix, name), reason)
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def _reason(
    prefix: str, module: nn.Module, name: str, shape: tuple[int, ...], tables: dict[int, str | None]
) -> str | None:
    path = _join(prefix.rpartition(".")[2], name)  # what the module is called where it stands, and the parameter
    if len(shape) < 2:
        return "bias" if _BIAS.search(name) else "one dimension"
    if isinstance(module, _TRANSFORMS) and name == "weight":
        return None
    if _BIAS.search(path):
        return "bias"
    if type(module).__name__.endswith("Norm"):
        return "norm"
    if id(module) in tables:
        return tables[id(module)]
    if sum(size > 1 for size in shape) < 2:  # (1, 1, D): a token; (C, 1, 1): a gain for every channel
        return "one direction"
    if _PLACE.search(path):
        return "position"
    return "token" if _TOKEN.search(name) else None


def _tables(module: nn.Module) -> Iterator[tuple[nn.Module, str | None]]:
    """Where a tower tells which embedding is that of words: all others of that tower say where a word stands."""
    get = getattr(module, "get_input_embeddings", None)
    try:
        words = get() if callable(get) else None
    except NotImplementedError:
        return
    if isinstance(words, nn.Embedding):
        for table in module.modules():
            if isinstance(table, nn.Embedding):
                yield table, None if table is words else "position"


def _listed(module: nn.Module) -> Iterable[str]:
    """By timm's convention: names of a module's own parameters, or patterns."""
    listed = getattr(module, "no_weight_decay", None)
    return listed() if callable(listed) else ()


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def by_pattern(names: dict[str, str]) -> dict[str, str]:
    """The same with numbers of blocks as `*`, so that a hundred layers are one line."""
    return {re.sub(r"(?<=\.)\d+(?=\.)", "*", name): reason for name, reason in names.items()}
