"""Become another program that is sent SIGTERM when the process that started it dies (Linux).

    python follow.py COMMAND WORD ...

The kernel keeps this request through exec; so nothing has to be done between fork and exec in the study itself, which
has threads. A cell is thus never left running by a study that was killed.
"""

import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1


def main(words: list[str]) -> None:
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it died between the two lines above
            return
    os.execvp(words[0], words)


if __name__ == "__main__":
    main(sys.argv[1:])
