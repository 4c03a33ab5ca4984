"""What pages say can be found: files that they link to or name, verbs and tools in their commands."""

import re
from pathlib import Path

import pytest

from amclr_scale.commands.main import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("amclr_scale", "tests", "tools", "configs", "launch", "docs")
TWO_WORDS = {verb.partition(" ")[0] for verb in VERBS if " " in verb}


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_that_are_named_exist(page):
    text = page.read_text()
    for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./]+)`", text):
        assert (ROOT / name.rstrip("/")).exists(), name
    for tool in re.findall(r"python (tools/\w+\.py)", text):
        assert (ROOT / tool).exists(), tool
    for module in re.findall(r"`(amclr_scale(?:\.[a-z_0-9]+)+)", text):
        parts = module.split(".")
        places = [ROOT.joinpath(*parts[:n]) for n in (len(parts), len(parts) - 1) if n > 1]
        assert any(place.is_dir() or place.with_suffix(".py").exists() for place in places) or len(parts) == 2, module


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_have_verbs_that_exist(page):
    for first, second in re.findall(r"amclr-scale +([a-z_]+)(?: +([a-z_]+))?", page.read_text()):
        assert (f"{first} {second}" if first in TWO_WORDS else first) in VERBS, (first, second)
