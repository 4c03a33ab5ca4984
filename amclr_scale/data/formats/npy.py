"""Tables of numbers in numpy's .npy files that others wrote, mapped into memory."""

from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np


def map_npy(file: Path) -> Any:
    """What `numpy.load` finds, read where it is looked at: an array, or whatever else the file holds.

    Raises:
        OSError: there is no such file.
        ValueError: it is empty, cut off, damaged or forged, or no regular file: a named pipe would be waited for.
    """
    if file.exists() and not file.is_file():
        raise ValueError("a folder, a named pipe or a device")
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (EOFError, TokenError, BadZipFile, RecursionError) as error:
        raise ValueError(str(error)) from error
