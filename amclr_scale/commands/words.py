"""What commands have in common: how they describe themselves; mistakes in words, exit code 2, no traceback."""

import argparse
import errno
import logging
import sys
from collections.abc import Callable

from amclr_scale.errors import UserError

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def command_parser(verb: str, doc: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser that says what the module's docstring says, line by line.

    Args:
        verb: as it is typed after `amclr-scale`.
        epilog: what follows the options.
    """
    plain = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"amclr-scale {verb}", description=doc, epilog=epilog, formatter_class=plain)


def run_command(work: Callable[[list[str]], None], argv: list[str]) -> int:
    """Do `work`; the exit code: 2 after a user's mistake, told in one line, 1 after a full or closed disk."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        work(argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
