"""The fingerprint of what a run reads: of the shards and their order, and of each file of features beside them.

    3f0c...9a-image_reference:1b2c3d4e

A part without a name is of the shards, a second one of their communities; others have the key of `data` that names the
file. Imports no torch.
"""

from collections.abc import Mapping

SHARDS = "train"  # data.train


def joined(shards: str, files: Mapping[str, str]) -> str:
    """One text; `files` are digests by key of `data`."""
    return "-".join([shards, *(f"{key}:{digest}" for key, digest in files.items())])


def parts(fingerprint: str) -> dict[str, str]:
    """The reverse: a digest by key of `data`, `train` for the shards."""
    pieces = fingerprint.split("-")
    files = dict(piece.split(":", 1) for piece in pieces if ":" in piece)
    return {SHARDS: "-".join(piece for piece in pieces if ":" not in piece), **files}
