"""What a tower's name stands for, in a table by name or by library."""

from collections.abc import Mapping
from typing import TypeVar

from amclr_scale.errors import UserError, did_you_mean, one_of

T = TypeVar("T")


def kind_of(name: str, kinds: Mapping[str, T], key: str) -> T:
    """What a tower's name stands for: itself, or KIND/NAME for all that are called KIND/something.

    Raises:
        UserError: nothing, naming the key.
    """
    library, slash, rest = name.partition("/")
    found = f"{library}/NAME" if slash and rest else name
    if found not in kinds or name.endswith("/NAME"):
        raise UserError(f"{key}: expected {one_of(kinds)}, got {name}{did_you_mean(name, kinds)}")
    return kinds[found]
