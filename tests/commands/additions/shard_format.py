"""A format of shards of one's own: zip files of stored members, in which neighbours with one name are a sample."""

import hashlib
import os
import struct
import zipfile
import zlib
from itertools import groupby

import numpy as np

from amclr_scale.data.formats.members import ChangedShardError, Flag, Members, ShardFormat
from amclr_scale.data.formats.shards import SHARD_FORMATS
from amclr_scale.data.formats.tar import split_name

LOCAL = struct.Struct(
    "<26x2H"
)  # in front of a member: fixed fields, then the lengths of its name and of the extra field


def scan(path):
    with zipfile.ZipFile(path) as opened:
        found = [(*split_name(one.filename), one) for one in opened.infolist()]
    extensions = sorted({extension for _, extension, _ in found})
    sizes = [len(list(members)) for _, members in groupby(found, key=lambda one: one[0])]
    return Members(
        row_start=np.cumsum([0, *sizes]),
        offset=np.array([one.header_offset for *_, one in found]),
        size=np.array([one.file_size for *_, one in found]),
        header=np.array([one.CRC for *_, one in found], dtype=np.uint32),  # of the content, in a zip
        extension=np.array([extensions.index(extension) for _, extension, _ in found], dtype=np.uint8),
        flag=np.full(len(sizes), Flag.WHOLE, dtype=np.uint8),
        extensions=extensions,
        digest=hashlib.sha256(repr([(one.filename, one.CRC) for *_, one in found]).encode()).hexdigest(),
        length=path.stat().st_size,
    )


class ZipReader:
    def __init__(self, url, file, members):
        self.url, self.file, self.members = url, file, members

    def read(self, row, wanted):
        found = self.members.of_row(row)
        return {extension: self.member(*found[extension]) for extension in found if extension in wanted}

    def member(self, offset, size, crc):
        start = offset + LOCAL.size + sum(self.lengths(offset))
        content = os.pread(self.file, size, start)
        if zlib.crc32(content) != crc:
            raise ChangedShardError(f"{self.url}: it has changed since it was indexed")
        return content

    def lengths(self, offset):
        return LOCAL.unpack(os.pread(self.file, LOCAL.size, offset))

    def key(self, row):
        offset = int(self.members.offset[self.members.row_start[row]])
        name = os.pread(self.file, self.lengths(offset)[0], offset + LOCAL.size)
        return split_name(name.decode())[0]

    def close(self):
        os.close(self.file)


SHARD_FORMATS[".zip"] = ShardFormat(scan, ZipReader)
