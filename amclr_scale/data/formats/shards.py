"""The formats of shards, by the ending of their names.

A format of one's own is a `ShardFormat` (data/formats/members.py) and an entry in SHARD_FORMATS, as in
tests/commands/additions/shard_format.py. Any of them may be gzipped: it is unpacked before it is looked at.
"""

from amclr_scale.data.formats.members import ShardFormat
from amclr_scale.data.formats.tar import TAR

SHARD_FORMATS: dict[str, ShardFormat] = {".tar": TAR}
_PACKED = {".tgz": ".tar", ".gz": ""}  # an ending -> that of what is inside


def shard_suffixes() -> tuple[str, ...]:
    """What shards may end in."""
    return (*SHARD_FORMATS, *(f"{suffix}.gz" for suffix in SHARD_FORMATS), ".tgz")


def is_packed(url: str) -> bool:
    """Whether a shard is gzipped, by its name."""
    return url.endswith(tuple(_PACKED))


def format_of(url: str) -> ShardFormat:
    """The format that an address ends in; tar where it says nothing, as that of a command need not."""
    name = url.partition("?")[0] if "://" in url else url
    for ending, inside in _PACKED.items():
        name = name.removesuffix(ending) + inside if name.endswith(ending) else name
    return next((kind for suffix, kind in SHARD_FORMATS.items() if name.endswith(suffix)), TAR)
