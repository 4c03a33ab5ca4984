"""YAML as configurations are written in: plain values of YAML 1.2, every key once. Imports no torch."""

import re
from copy import deepcopy
from functools import lru_cache
from typing import Any

import yaml

from amclr_scale.errors import UserError

MOST_VALUES = 100_000


class Loader(yaml.SafeLoader):
    """YAML 1.2's idea of plain values; a key given twice is an error.

    1e-4 is a number, 010 is ten; off, 1:30 and 2026-11-22 are words, where YAML 1.1 has False, 90 and a date.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]}: given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _integer(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    return int(text, 16 if "0x" in text else 8 if "0o" in text else 10)


_OTHERWISE = [f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "timestamp")]
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OTHERWISE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(\d[\d_]*|0x[\da-fA-F]+|0o[0-7]+)$"),
    list("-+0123456789"),
)
Loader.add_constructor("tag:yaml.org,2002:int", _integer)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?([eE][-+]?\d+)|\d+\.\d*|\.inf|\.nan)$"),
    list("-+.0123456789"),
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


class Dumper(yaml.SafeDumper):
    """Quotes every word that YAML 1.1 or 1.2 would read as something else."""


Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *Loader.yaml_implicit_resolvers.get(first, ())]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
}


def _values(tree: Any, known: dict[int, int]) -> int:
    """How many values a tree has, those behind each alias counted each time; every part is looked at once."""
    if not isinstance(tree, dict | list):
        return 1
    if id(tree) not in known:
        known[id(tree)] = MOST_VALUES + 1  # of one that holds itself
        known[id(tree)] = 1 + sum(_values(part, known) for part in (tree.values() if isinstance(tree, dict) else tree))
    return known[id(tree)]


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """The cells of a study share a file, and their words."""
    found = yaml.load(text, Loader)
    if _values(found, {}) > MOST_VALUES:
        raise ValueError(f"aliases that stand for more than {MOST_VALUES:,} values")
    return found


def _in_words(error: Exception) -> str:
    """On one line, without the library's name for a text that is no file and its mark below the column."""
    words = " ".join(word for word in str(error).split() if word != "^")
    return re.sub(r'in "<[a-z ]+>", (line)', r"at \1", words)


def parse(text: str, where: str, hint: str = "") -> Any:
    """What a text of YAML says.

    Args:
        where: the text is from, for the message.
        hint: what may help, at the message's end.

    Raises:
        UserError: it is no YAML, or gives a key twice.
    """
    try:
        return deepcopy(_parsed(text))  # whoever asks may change it
    except RecursionError:
        raise UserError(f"{where}: not readable as YAML: nested too deeply{hint}") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{where}: not readable as YAML: {_in_words(error)}{hint}") from error
