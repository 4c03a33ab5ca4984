"""What a user can mend, told in words. Imports no torch."""

import difflib
from collections.abc import Iterable

from amclr_scale.addresses import masked


class UserError(ValueError):
    """A mistake in a configuration, a file or a command.

    The message begins with the key, path or argument to change, then says what was expected, what was got and how
    to mend it. `launch/` prints it without a traceback and exits with code 2. Secrets in addresses are left out of it.
    """

    def __init__(self, *words: object):
        super().__init__(*(masked(word) if isinstance(word, str) else word for word in words))


class AbsentDataError(UserError):
    """Data that a key names are not here: no such file, or its store does not give it."""


class AgreedError(UserError):
    """A mistake that all ranks know of, and raise at the same place: each of them can end with it, in good order."""


class AbsentError(Exception):
    """Other ranks have not come, or one of them has failed, before anything could begin; trying again may help."""


def one_of(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def nearest(word: str, known: Iterable[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """The n known words that a misspelt one is nearest to; none that is further away than `cutoff`.

    Those that begin with it come first: of adam, adamw is meant rather than radam.
    """
    near = difflib.get_close_matches(word, list(known), n=10 * n, cutoff=cutoff)
    return sorted(near, key=lambda one: not one.startswith(word))[:n]


def did_you_mean(word: str, known: Iterable[str], n: int = 1) -> str:
    """`; did you mean 'sogclr'?`, for the end of a message; "" where nothing is near."""
    near = nearest(word, known, n)
    return f"; did you mean {one_of(map(repr, near))}?" if near else ""
