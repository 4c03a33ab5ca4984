"""Pages of the site: links lead to pages that exist, and the menu names every page once."""

import re
from pathlib import Path

import amclr_scale
from tools.site_pages import AT_THE_ROOT, menu, rooms, site_address, with_site_links

ROOT = Path(__file__).parents[2]


def test_links_between_the_root_and_docs_become_links_of_the_site():
    assert site_address("docs/studies.md#reading-a-report", "index.md") == "studies.md#reading-a-report"
    assert site_address("../README.md", "engine.md") == "index.md"
    assert site_address("../../../README.md", "studies/mini_amclr/report.md") == "../../index.md"
    assert site_address("memory.png", "memory.md") == "memory.png"
    assert site_address("#limits", "engine.md") == "#limits"
    assert site_address("https://example.org/a.md", "engine.md") == "https://example.org/a.md"
    assert site_address("../tools/kill_test.py", "engine.md") is None
    assert site_address("no_such_page.md", "engine.md") is None


def test_a_file_that_the_site_does_not_have_is_told_by_its_path():
    text = (
        "See [the plan](../configs/quickstart.yaml) and ![a](memory.png); `[not](a.link)`.\n```\n[nor](this.one)\n```\n"
    )
    assert with_site_links(text, "memory.md") == text.replace(
        "[the plan](../configs/quickstart.yaml)", "the plan (`configs/quickstart.yaml`)"
    )


def test_every_module_with_a_docstring_is_in_the_reference():
    found = rooms()
    assert set(found) == {
        path.name for path in (ROOT / "amclr_scale").iterdir() if path.is_dir() and list(path.glob("*.py"))
    } | {"amclr_scale"}
    assert "amclr_scale.objectives.sogclr" in found["objectives"]
    assert "amclr_scale.engine.zero.layerwise" in found["engine"]
    assert "amclr_scale.types" in found["amclr_scale"]
    assert sum(map(len, found.values())) > 200


def test_the_menu_names_every_page_once():
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    pages = [page for page in pages if not page.endswith("discussion.md")]
    pages += [*AT_THE_ROOT.values(), "reference/engine.md", "a_new_page.md"]
    named = re.findall(r"[\w/]+\.md", repr(menu(sorted(pages))))
    assert sorted(named) == sorted(pages)


def test_the_version_is_told_everywhere_alike():
    version = amclr_scale.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
