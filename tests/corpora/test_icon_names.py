"""Names of icons to concepts; sets to families and kinds; licences."""

import pytest

from amclr_scale.corpora.families import families
from amclr_scale.corpora.icon_names import Meaning, Names, captions, kind_of
from amclr_scale.corpora.icon_sets import KEPT_LICENCES, describe, why_left_out


def icon_set(names, prefix="one", categories=None, **info):
    keys = {"suffixes": info.pop("suffixes", {}), "prefixes": info.pop("prefixes", {})}
    icons = {name: {"body": "", **({"hidden": True} if name.startswith("!") else {})} for name in names}
    return describe(prefix, {"info": info, "icons": icons, "categories": categories or {}, **keys})


MANY = [f"thing-{i}a" for i in range(100)]


@pytest.mark.parametrize(
    ("name", "others", "suffixes", "concept", "style"),
    [
        ("home", [], {}, "home", ""),
        ("home-outline", [], {}, "home", "outline"),
        ("arrow-left-filled-24", [], {}, "arrow left", "filled 24"),
        ("traffic-light", MANY, {}, "traffic light", ""),  # a thing here
        ("traffic-light", MANY, {"light": "Light"}, "traffic", "light"),  # a style there
        ("home-bold", [f"{name}-bold" for name in MANY], {}, "home", "bold"),
        ("round-wash", [f"round-{name}" for name in MANY], {}, "wash", "round"),
        ("round-wash", MANY, {}, "round wash", ""),
        ("add-24-filled", [], {"24-filled": "24 Filled"}, "add", "24 filled"),
        ("24", [], {}, "24", ""),
        ("outline", [], {}, "outline", ""),
        ("3d_Cube", [], {}, "3d cube", ""),
    ],
)
def test_style_words_and_numbers_are_no_part_of_a_concept(name, others, suffixes, concept, style):
    meaning = Names(icon_set([name, *others], suffixes=suffixes)).read(name)
    assert (meaning.concept, meaning.style) == (concept, style)


def test_captions_are_distinct_and_begin_with_the_words():
    found = captions(Meaning("arrow left bold", "arrow left", "bold"), "arrows", "Solar")
    assert found == [
        "arrow left bold", "arrow left", "arrow left, arrows", "arrow left, drawn by Solar", "bold arrow left",
        "arrow left (bold)", "left: arrow",
    ]  # fmt: skip
    assert captions(Meaning("home", "home", ""), "", "Solar") == ["home", "home, drawn by Solar"]


def test_kinds():
    titles = {
        "Arcticons": ("Logos", "logo"), "Font Awesome 5 Brands": ("Archive / Unmaintained", "logo"),
        "Noto Emoji": ("Emoji", "emoji"), "Fluent Emoji": ("", "emoji"), "Circle Flags": ("Flags / Maps", "flag"),
        "Maki": ("Flags / Maps", "map"), "Solar": ("UI 24px", "ui"), "Feather Icons": ("", "ui"),
        "Devicon": ("Programming", "programming"), "Health Icons": ("Thematic", "thematic"),
    }  # fmt: skip
    assert {title: kind_of(icon_set([], name=title, category=group)) for title, (group, _) in titles.items()} == {
        title: kind for title, (_, kind) in titles.items()
    }


def test_a_set_says_what_is_withdrawn_and_where_names_belong():
    found = icon_set(["b", "a", "!c"], categories={"Some": ["a"], "More": ["a", "b"]}, license={"spdx": "MIT"})
    assert (found.names, found.hidden, found.licence) == (("a", "b"), 1, "MIT")
    assert found.categories == {"a": "some", "b": "more"}


def test_licences():
    assert all(not why_left_out(licence) for licence in KEPT_LICENCES)
    assert why_left_out("CC-BY-NC-SA-4.0") == "no commercial use"
    assert why_left_out("CC-BY-ND-4.0") == "no derivatives"
    assert "GPL" in why_left_out("GPL-2.0-or-later")
    assert why_left_out("") == why_left_out("Proprietary") == "a licence that is not on the list"


def test_families_are_of_one_author_known_forks_or_equal_pictures():
    sets = [
        icon_set([], prefix, author={"name": author})
        for prefix, author in {
            "a": "Ann", "b": "ann", "c": "Carl", "d": "Dora", "ion": "Ben", "famicons": "Family", "e": "Eve", "f": "",
            "g": "",
        }.items()
    ]  # fmt: skip
    own = {one.prefix: [f"{one.prefix}{i}" for i in range(98)] for one in sets}
    many = {prefix: [*digests, "circle", "square"] for prefix, digests in own.items()}  # which all sets have
    many["d"] += ["x", "y", "z", "v"]
    many["c"] += ["x", "y", "z", "v"]  # 4 of 104
    many["e"] += ["p", "q"]
    many["f"] += ["p", "q"]  # 2 of 102: too few
    found = families(sets, many)
    assert found == {
        "a": "a", "b": "a", "c": "c", "d": "c", "ion": "famicons", "famicons": "famicons", "e": "e", "f": "f", "g": "g",
    }  # fmt: skip
