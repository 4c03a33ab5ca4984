"""The worked examples are what the page says, two claims are wrong, and the curves of the picture are in order."""

from pathlib import Path

from tools.memory_pages.worked_examples import examples, page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_is_computed():
    assert (DOCS / "memory_worked_examples.md").read_text() == page()


def test_two_published_figures_are_corrected_and_all_others_agree():
    wrong = [e.claimed for found in examples().values() for e in found if not e.agrees]
    assert wrong == ["805.8 MB", "1.2 GB"]


def test_the_figures_that_everybody_quotes():
    exact = {round(e.computed) for found in examples().values() for e in found}
    assert {805_306_368, 10_029_674_496, 4 * 2**30, 24 * 2**30, 128 * 2**20, 64 * 2**20} <= exact
