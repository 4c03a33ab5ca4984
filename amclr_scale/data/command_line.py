"""What every data tool does around its work: mistakes in words, exit code 2, no traceback."""

import errno
import logging
import sys
from collections.abc import Callable

from amclr_scale.errors import UserError

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run_command(main: Callable[[], None]) -> None:
    """Call `main`; print a user's mistake as one line and exit with code 2, a full or closed disk with code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
