"""Bytes in words, and words in bytes. Binary units everywhere: 1 GiB = 2^30 bytes. Nothing is rounded in silence."""

import math
import re

from amclr_scale.errors import UserError

KIB, MIB, GIB = 2**10, 2**20, 2**30

_UNITS = {"b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def in_words(size: int) -> str:
    """`4.00 GiB`, `186.3 MiB`, `12.0 KiB`, `640 B`: three or four digits, in the unit that leaves a number above 1."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.2f} {name}" if unit == GIB else f"{size / unit:.1f} {name}"
    return f"{size} B"


def in_two_digits(x: float) -> str:
    """`2,900` for 2890, `0.012` for 0.01234: as many digits as a prediction deserves."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    places = 1 - math.floor(math.log10(abs(x)))
    rounded = round(x, places)
    return f"{rounded:,.{max(0, 1 - math.floor(math.log10(abs(rounded))))}f}"


def in_bytes(words: str, key: str = "memory") -> int:
    """`80GiB`, `79.6 GiB`, `512 MiB`, `24GB` -> bytes.

    Args:
        key: the argument that these words were given for, named in the error.

    Raises:
        UserError: no number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", words)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UserError(f"{key}: expected a size such as 80GiB, 512MiB or 24GB, got {words!r}")
    return round(float(match[1]) * unit)
