"""What other nodes are told of a run by small files."""

import pytest

from amclr_scale.checkpoint import marks
from amclr_scale.checkpoint.start import agree_on_start
from amclr_scale.commands.supervising.looks import newest_step
from amclr_scale.config.load import load
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.errors import AgreedError


def test_a_file_has_changed_when_it_was_written_again(tmp_path):
    before = marks.Changes(tmp_path / "a")
    assert not before.happened
    before.tell()
    assert before.happened
    after = marks.Changes(tmp_path / "a")
    assert not after.happened
    after.tell()
    assert after.happened
    marks.Changes(tmp_path / "nowhere" / "a").tell()  # no run yet: nobody to tell


def test_a_run_whose_checkpoints_are_on_another_node_does_not_begin_again(tmp_path):
    """As where rank 0 is started on another node than before."""
    run = tmp_path / "a"
    run.mkdir()
    assert marks.step_elsewhere(run) == ("", 0)
    assert newest_step(run) == 0
    marks.note_elsewhere(run, "node1", 12)
    assert marks.step_elsewhere(run) == ("node1", 12)
    assert newest_step(run) == 12
    config = load("quickstart", [f"run.folder={tmp_path}", "run.name=a", "resume=auto", "run.shared=false"])
    told = r"^run\.shared: the checkpoints of .*/a are on node1, up to step 12, and rank 0 is on another node now"
    with pytest.raises(AgreedError, match=told):
        agree_on_start(config, run, "f", load_tokenizer("emoji", 8), 0)
    (run / marks.ELSEWHERE).write_text("[" * 20_000)
    assert marks.step_elsewhere(run) == ("", 0)
