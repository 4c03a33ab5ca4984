"""What commands have in common: how they describe themselves; mistakes in words, exit code 2, no traceback."""

import argparse
import errno
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from amclr_scale.errors import UserError

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_OF_RUST = re.compile(r"\(os error (\d+)\)$")  # so end the errors of libraries that are written in Rust
_OF_MEMORY = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")  # torch, on a CPU
_SHOWN = 60  # characters of a name that is too long


def command_parser(verb: str, doc: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser that says what the module's docstring says, line by line.

    Args:
        verb: as it is typed after `amclr-scale`.
        epilog: what follows the options.
    """
    plain = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"amclr-scale {verb}", description=doc, epilog=epilog, formatter_class=plain)


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Refuse options that are smaller numbers; those that were not given pass.

    Args:
        names: of options, as argparse keeps them.

    Raises:
        UserError: naming the option.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")


def check_place(option: str, file: Path | None) -> None:
    """Refuse a file to write in a folder that is not there, before the work; one that is not asked for passes.

    Raises:
        UserError: naming the option.
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"{option}: expected a name in a folder that is there, got {file}")


def refused(error: BaseException, writes: str) -> tuple[int, str] | None:
    """What a file system refuses, in words, behind the exit code: 1 of a full or closed disk, 2 of an impossible name.

    Args:
        error: what a command ended with.
        writes: the key or argument that says where it writes, for an error that names no file.

    Returns:
        None for another error.
    """
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return 2, "~: expected a user with a home folder at the beginning of a path, got none; write the path in full"
    if isinstance(error, RuntimeError) and (asked := _OF_MEMORY.search(str(error))):
        size = f"{int(asked[1]) / 2**30:,.1f} GiB"
        return 1, f"data.image_size or batch: expected what fits this machine's memory, got {size} at once; lower one"
    of_rust = _OF_RUST.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(of_rust[1]) if of_rust else None
    name = str(error.filename or "") if isinstance(error, OSError) else ""
    if number == errno.ENAMETOOLONG:
        shown = f"{name[:_SHOWN]}..." if len(name) > _SHOWN else name or writes
        return 2, f"{shown}: expected a path that a file system can hold, got one whose names are too long"
    if number not in _OF_THE_DISK:
        return None
    fix = "make room there, or write elsewhere"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "expected a place that this user can read, and write where the command writes"
    return 1, f"{name or writes}: {os.strerror(number)}; {fix}"


def run_command(work: Callable[[list[str]], int | None], argv: list[str], writes: str = "--out") -> int:
    """Do `work`; the exit code: 2 after a user's mistake, told in one line, 1 after a full or closed disk.

    Args:
        work: of the command; its exit code, or None for 0.
        argv: the words behind the verb.
        writes: the argument that says where it writes.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return work(argv) or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (told := refused(error, writes)) is None:
            raise
        print(told[1], file=sys.stderr)
        return told[0]
