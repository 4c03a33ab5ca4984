"""Headers of tars as nobody should write them: the scan comes to an end, stays inside the file, and tells of damage."""

import io
import os
import random
import secrets
import signal
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from amclr_scale.data.formats.tar import _Scanner, _table, scan
from amclr_scale.data.storage import Storage
from amclr_scale.errors import UserError
from tests.data.shards import write_tar

MUTATIONS = [4000, pytest.param(6000, marks=pytest.mark.slow)]
SECONDS = 120  # of the whole property test: a scan that does not end is the fault that it looks for
BLOCK = 512
FIELDS = {"name": (0, 100), "size": (124, 136), "checksum": (148, 156), "kind": (156, 157), "link": (157, 257),
          "magic": (257, 265), "prefix": (345, 500)}  # fmt: skip
EIGHT = b"\x80" + b"\0" * 10 + b"\x08"  # in base 256
NUMBERS = [
    b"", b"-0000000001\0", b"-0000000777 ", b"77777777777\0", b"zzzzzzzzzzzz", b"0_0_0_0_0_0_", b"+0000000010\0",
    b" 10 10 10 10", b"9999999999\0\0", b"\xff" * 12, b"\xff" * 11 + b"\0", b"\x80" + b"\xff" * 11,
    EIGHT, b"\xbf" * 12, b"\xc0" + b"\0" * 11, "\u0661\u0662".encode() * 3,
]  # fmt: skip
SIZES = [
    b"-512",
    b"-1",
    b"1e9",
    b"0x10",
    b" 8",
    b"1_0",
    b"9" * 19,
    b"9" * 30,
    b"9" * 5000,
    b"",
    "\u0663".encode(),
    b"8",
]


def archive() -> bytes:
    """Ordinary members, GNU's long names and links, extended headers, a hard link."""
    out = io.BytesIO()
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(fileobj=out, mode="w", format=form) as tar:
            for i, name in enumerate(("0.txt", "a" * 150 + "/1.txt", "2.txt")):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = 700 * (i % 2), i + 0.5
                tar.addfile(info, io.BytesIO(bytes(info.size)))
            link = tarfile.TarInfo("3.txt")
            link.type, link.linkname = tarfile.LNKTYPE, "b" * 150
            tar.addfile(link)
    return out.getvalue().replace(bytes(BLOCK * 2), b"")  # one after the other


def with_checksum(block: bytes) -> bytes:
    blank = block[:148] + b" " * 8 + block[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def mutated(content: bytes, heads: list[int], draw: random.Random) -> bytes:
    """With one to three changes, whose checksums mostly say that they were meant."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.choice(heads)
        block = bytearray(found[at : at + BLOCK])
        name = draw.choice(list(FIELDS))
        start, end = FIELDS[name]
        value = draw.choice(NUMBERS) if draw.random() < 0.7 else draw.randbytes(end - start)
        if name == "kind":
            value = draw.choice((b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"g", b"x", b"L", b"K", b"S", b"\xff"))
        block[start:end] = value[: end - start].ljust(end - start, b"\0")
        found[at : at + BLOCK] = block if name == "checksum" or draw.random() < 0.2 else with_checksum(bytes(block))
    if draw.random() < 0.3:
        del found[draw.randrange(len(found)) :]
    if draw.random() < 0.1:
        at = draw.randrange(0, len(found) + 1)
        found[at:at] = draw.randbytes(draw.choice((1, 511, 512, 1024)))
    return bytes(found)


def check(content: bytes) -> None:
    try:
        table = _table(_Scanner(content), Path("x.tar"))
    except UserError:
        return
    assert (table.offset >= 0).all()
    assert (table.size >= 0).all()
    assert (table.offset + table.size <= len(content)).all()
    assert len(table.offset) <= len(content) // BLOCK
    assert (np.diff(table.row_start) > 0).all()
    assert table.row_start[0] == 0
    assert table.row_start[-1] == len(table.offset)
    assert len(table) == len(table.row_start) - 1


def expired(*_):
    raise TimeoutError(f"scanning small files took more than {SECONDS} s")


@pytest.mark.parametrize("mutations", MUTATIONS)
def test_mutated_headers(mutations):
    seed = int(os.environ.get("TAR_SEED") or secrets.randbits(32))
    print(f"TAR_SEED={seed}")  # shown where it fails; set, the test does the same again
    draw, content = random.Random(seed), archive()
    heads = [at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"]
    assert len(heads) > 12
    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(SECONDS)
    try:
        for _ in range(mutations):
            check(mutated(content, heads, draw))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("number", NUMBERS, ids=[repr(number) for number in NUMBERS])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
def test_each_size_in_each_kind(number, kind):
    """Of a first member with this size, a second one is found, or the damage is told."""
    first, second = (bytearray(BLOCK), bytearray(BLOCK))
    for block, name in ((first, b"0.txt"), (second, b"1.txt")):
        block[:5], block[156:157], block[257:263] = name, b"0", b"ustar\0"
        block[124:136] = b"%011o\0" % 0
    first[124:136], first[156:157] = number.ljust(12, b"\0")[:12], kind
    data = bytes(BLOCK) if number == EIGHT else b""
    content = with_checksum(bytes(first)) + data + with_checksum(bytes(second)) + bytes(2 * BLOCK)
    check(content)
    table = _table(_Scanner(content), Path("x.tar"))
    assert len(table) == 1 + (kind == b"0") or table.damage


@pytest.mark.parametrize("size", SIZES, ids=[repr(size[:20]) for size in SIZES])
def test_sizes_of_extended_headers(size):
    record = b"size=" + size + b"\n"
    length = len(record) + 3
    length += len(str(length)) - 2
    body = b"%d %s" % (length, record)
    out = bytearray(BLOCK)
    out[:1], out[156:157], out[257:263], out[124:136] = b"x", b"x", b"ustar\0", b"%011o\0" % len(body)
    member = bytearray(BLOCK)
    member[:5], member[156:157], member[257:263], member[124:136] = b"0.txt", b"0", b"ustar\0", b"%011o\0" % 8
    content = with_checksum(bytes(out)) + body.ljust(-(-len(body) // BLOCK) * BLOCK, b"\0")
    content += with_checksum(bytes(member)) + b"12345678".ljust(BLOCK, b"\0") + bytes(2 * BLOCK)
    check(content)
    table = _table(_Scanner(content), Path("x.tar"))
    assert len(table) == 1
    assert bool(table.damage) == (size != b"8")


def test_a_name_as_long_as_a_film_costs_no_memory(tmp_path):
    """And members behind it are found."""
    path = tmp_path / "a.tar"
    head = bytearray(BLOCK)
    head[:1], head[156:157], head[257:263] = b"L", b"L", b"ustar\0"
    head[124:136] = b"%011o\0" % (1 << 28)
    with path.open("wb") as file:
        file.write(with_checksum(bytes(head)))
        file.seek(1 << 28, os.SEEK_CUR)
        file.write(write_tar(tmp_path / "b.tar", [("0.txt", b"abc")]).read_bytes())
    tracemalloc.start()
    table = scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table) == 1
    assert "268,435,456 bytes" in table.damage[0]
    assert peak < 4 << 20


def test_places_of_damage_are_counted_past_a_hundred():
    head = with_checksum(bytes(bytearray(b"0.txt".ljust(156, b"\0") + b"0").ljust(BLOCK, b"\0")))
    table = _table(_Scanner((head + b"x" * BLOCK) * 1000), Path("x.tar"))
    assert len(table) == 1000
    assert len(table.damage) == 102
    assert table.damage[100] == "and so at 900 further places"


def test_a_named_pipe_or_a_device_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    for path in (tmp_path / "a.tar", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="expected a regular file, got a folder, a named pipe or a device"):
            scan(path)
        with pytest.raises(UserError, match="expected a regular file"):
            Storage(tmp_path).open(str(path))
