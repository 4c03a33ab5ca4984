"""What a message between ranks is for, said by whoever sends it and read by whoever counts messages.

    with purpose("features"):
        keys = all_gather(rows, ranks)

A purpose holds for all collectives that start inside the block, and for the backward of those that are differentiable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

STATISTICS = "statistics"  # of rows: what is sent where nobody says otherwise

_purpose: ContextVar[str] = ContextVar("amclr_scale_purpose", default=STATISTICS)


def current_purpose() -> str:
    """What is being sent at the moment."""
    return _purpose.get()


@contextmanager
def purpose(words: str) -> Iterator[None]:
    """Say what the messages inside the block are for; the innermost block counts."""
    token = _purpose.set(words)
    try:
        yield
    finally:
        _purpose.reset(token)
