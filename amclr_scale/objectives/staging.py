"""Changes of an objective's state that wait until the step that they belong to has been applied.

    with staged() as commit:
        objective(embeddings).value.backward()     # reads the state as it was; what it writes waits
        ...
        if applied:
            commit()

A step can be abandoned after the objective has run: in fp16 the scaled gradient overflows while embeddings and loss are
finite, weights stay, and a loss scaler tries again with another batch. Without a commit the state stays, too. Outside
of `staged` changes take place at once, as in a plain training loop.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Change = Callable[[], None]

_waiting: ContextVar[list[Change] | None] = ContextVar("changes of state that wait", default=None)


@contextmanager
def staged() -> Iterator[Callable[[], None]]:
    """Let changes of state wait; gives what makes them, in their order. What is not made by the end is forgotten."""
    changes: list[Change] = []

    def commit() -> None:
        for change in changes:
            change()
        changes.clear()

    before = _waiting.set(changes)
    try:
        yield commit
    finally:
        _waiting.reset(before)


def when_applied(change: Change) -> None:
    """Change the state now, or, inside of `staged`, when the step has been applied.

    Args:
        change: local to this rank; holds the memory of what it will write until then.
    """
    waiting = _waiting.get()
    if waiting is None:
        change()
    else:
        waiting.append(change)


class _Nowhere(list[Change]):
    def append(self, change: Change) -> None:
        pass


@contextmanager
def forgotten() -> Iterator[None]:
    """Let changes of state be forgotten at once, for who asks what a step costs."""
    before = _waiting.set(_Nowhere())
    try:
        yield
    finally:
        _waiting.reset(before)


def is_staged() -> bool:
    """Whether changes wait: then backward is over when they take place."""
    return _waiting.get() is not None
