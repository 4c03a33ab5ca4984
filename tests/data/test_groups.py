"""Samples that show the same: who is alone, and whom further views may show."""

from amclr_scale.data.randomness import Draws
from amclr_scale.data.resident.groups import Groups


def test_who_is_alone():
    """Those whose group holds nobody else; a sample that says nothing, or has no picture, has no group."""
    assert Groups(["a", "b", "a", None, 3, None, "3"]).alone == 3  # b, 3 and "3", which are two things
    assert Groups(["a", "a"]).alone == Groups([None]).alone == Groups([]).alone == 0


def test_others_of_the_group_that_are_not_taken_yet():
    groups = Groups(["a", "b", "a", None, "a", None])
    drawn = [groups.other(0, [0], Draws(k)) for k in range(50)]
    assert set(drawn) == {2, 4}
    assert {groups.other(0, [0, 2], Draws(k)) for k in range(20)} == {4}
    assert {groups.other(0, [0, 2, 4], Draws(k)) for k in range(50)} == {2, 4}  # all are taken: any other one
    assert [groups.other(alone, [alone], Draws(0)) for alone in (1, 3, 5)] == [1, 3, 5]
