"""The scanner finds what the standard library finds, and says what the standard library passes over."""

import io
import tarfile

import numpy as np
import pytest

from amclr_scale.data.formats.members import Flag, Members
from amclr_scale.data.formats.tar import scan, split_name
from amclr_scale.errors import UserError
from tests.data.shards import pair, picture, write_tar


def read(path, members, row):
    content = path.read_bytes()
    return {ext: content[offset : offset + size] for ext, (offset, size, _) in members.of_row(row).items()}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_member_is_found_in_every_format(tmp_path, form):
    prefix = "" if form == tarfile.USTAR_FORMAT else "a long folder name/" * 12  # past the 100 bytes of a header
    name = prefix + ("" if form == tarfile.USTAR_FORMAT else "K\u00e4se-")
    members = [(name + key, data) for i in range(5) for key, data in pair(i)]
    path = write_tar(tmp_path / "a.tar", members, form=form)
    table = scan(path)
    assert len(table) == 5
    assert not table.damage
    with tarfile.open(path) as tar:
        infos = [info for info in tar if info.isfile()]
    assert table.offset.tolist() == [info.offset_data for info in infos]
    assert table.size.tolist() == [info.size for info in infos]
    assert read(path, table, 3) == {"png": picture(3), "txt": b"sample 3", "json": pair(3)[2][1]}


def test_folders_links_and_dot_files_are_no_samples(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("folder/x.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in (".hidden.txt", "folder/._0.png", "README"):
            tar.addfile(tarfile.TarInfo(name))
    assert len(scan(path)) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b.c.WEBP", ("a/b", "c.webp")), ("0.txt", ("0", "txt")), ("a.b/c", ("a.b/c", "")), ("x/.y", ("x/", "y"))],
)
def test_names_split_at_the_first_dot_of_the_file(name, expected):
    assert split_name(name) == expected


def test_a_damaged_header_loses_one_member_and_is_told(tmp_path):
    """The standard library stops here without a word."""
    path = write_tar(tmp_path / "a.tar", [m for i in range(20) for m in pair(i)])
    whole = scan(path)
    at = int(whole.offset[3 * 4]) - 512  # the picture of sample 4
    content = bytearray(path.read_bytes())
    content[at : at + 512] = bytes(range(256)) * 2
    path.write_bytes(content)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 12
    table = scan(path)
    assert len(table) == 20
    assert set(table.of_row(4)) == {"txt", "json"}
    assert len(table.damage) == 1
    assert f"byte {at:,}" in table.damage[0]


def test_a_header_of_zeros_does_not_end_the_archive(tmp_path):
    path = write_tar(tmp_path / "a.tar", [m for i in range(5) for m in pair(i)])
    at = int(scan(path).offset[3]) - 512
    content = bytearray(path.read_bytes())
    content[at : at + 512] = bytes(512)
    path.write_bytes(content)
    table = scan(path)
    assert len(table) == 5
    assert table.damage


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.77, 0.9])
def test_a_cut_tar_keeps_what_is_whole(tmp_path, kept):
    path = write_tar(tmp_path / "a.tar", [m for i in range(20) for m in pair(i)])
    whole = scan(path)
    end = int(path.stat().st_size * kept) + 100
    path.write_bytes(path.read_bytes()[:end])
    table = scan(path)
    complete = int((whole.offset + whole.size <= end).sum())
    assert (table.flag == Flag.CUT).sum() <= 1
    assert len(table.offset) - int((table.flag == Flag.CUT).sum()) == complete
    assert table.damage
    for row in range(len(table) - 1):
        assert read(path, table, row)["txt"] == f"sample {row}".encode()


def test_a_cut_inside_data_is_flagged(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("0.txt", b"a" * 5000)])
    path.write_bytes(path.read_bytes()[:2000])
    table = scan(path)
    assert table.flag.tolist() == [Flag.CUT]
    assert "inside 0.txt" in table.damage[0]


def test_a_cut_between_members_and_a_second_archive_are_told(tmp_path):
    """Nothing that is read is damaged, and samples are missing all the same."""
    path = write_tar(tmp_path / "a.tar", [m for i in range(5) for m in pair(i)])
    content, whole = path.read_bytes(), scan(path)
    path.write_bytes(content[: int(whole.offset[9]) - 512])
    table = scan(path)
    assert (len(table), set(table.flag.tolist())) == (3, {Flag.WHOLE})
    assert "without the mark of an end" in table.damage[0]
    path.write_bytes(content + content)
    assert scan(path).damage == [f"another archive begins at byte {len(content):,}, behind the end of this one: "
                                 "it is not read"]  # fmt: skip
    assert not whole.damage


@pytest.mark.parametrize("broken", [b"xx ", b"0 m", b"99 ", b"   "])
def test_a_damaged_extended_header_is_told(tmp_path, broken):
    """webdataset writes one in front of every member, for the fractions of a second of its time."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(4):
            info = tarfile.TarInfo(f"{i}.txt")
            info.size, info.mtime = 3, i + 0.5
            tar.addfile(info, io.BytesIO(b"abc"))
    whole, content = scan(path), bytearray(path.read_bytes())
    at = content.index(b"13 mtime=2.5")
    content[at : at + 3] = broken
    path.write_bytes(content)
    table = scan(path)
    assert table.damage == [f"no valid extended header at byte {at:,}, ignored"]
    np.testing.assert_array_equal(table.offset, whole.offset)


def test_samples_with_the_same_key_are_flagged(tmp_path):
    members = [*pair(0), *pair(1), *pair(0), ("5.txt", b"a"), ("5.txt", b"b")]
    table = scan(write_tar(tmp_path / "a.tar", members))
    assert table.flag.tolist() == [0, 0, Flag.DUPLICATE_KEY, 0, Flag.DUPLICATE_KEY]


def test_an_empty_tar_is_empty_and_another_file_is_refused(tmp_path):
    assert len(scan(write_tar(tmp_path / "a.tar", []))) == 0
    (tmp_path / "zero.tar").write_bytes(b"")
    assert len(scan(tmp_path / "zero.tar")) == 0
    assert "byte 0 without the mark of an end" in scan(tmp_path / "zero.tar").damage[0]
    (tmp_path / "b.tar").write_bytes(b"this is not a tar " * 500)
    with pytest.raises(UserError, match=r"b\.tar: expected a tar of samples"):
        scan(tmp_path / "b.tar")


def test_the_table_survives_its_file(tmp_path):
    table = scan(write_tar(tmp_path / "a.tar", [m for i in range(5) for m in pair(i)]))
    table.save(tmp_path / "a.npz")
    again = Members.load(tmp_path / "a.npz")
    for name in ("row_start", "offset", "size", "header", "extension", "flag"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    assert (again.extensions, again.digest) == (table.extensions, table.digest)
    written = (tmp_path / "a.npz").read_bytes()
    for content in (b"no table", b"", written[:100], written[:-100]):  # as a machine that went down leaves it
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(UserError, match="expected a member table"):
            Members.load(tmp_path / "a.npz")
