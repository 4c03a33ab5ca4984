"""The house stays one that a stranger finds the way in: small rooms, short files, few doors to heavy packages."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_LINES = 350
MOST_MODULES = 22
ONE_METHOD_ONE_FILE = {Path("amclr_scale/objectives"), Path("tests/objectives")}


def sources() -> list[Path]:
    folders = ("amclr_scale", "launch", "tools", "tests")
    return [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_a_file_is_read_in_one_sitting():
    found = sources()
    assert len(found) > 300
    long = {str(path): lines for path in found if (lines := len((ROOT / path).read_text().splitlines())) > MOST_LINES}
    assert long == {}


def test_a_room_is_seen_at_one_glance():
    rooms: dict[Path, int] = {}
    for path in sources():
        rooms[path.parent] = rooms.get(path.parent, 0) + 1
    crowded = {str(room): n for room, n in rooms.items() if n > MOST_MODULES and room not in ONE_METHOD_ONE_FILE}
    assert crowded == {}
