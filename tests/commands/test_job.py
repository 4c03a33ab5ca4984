"""What a job is asked for and cannot give is told before it starts."""

from types import SimpleNamespace

import pytest

from amclr_scale.commands.job import check_best
from amclr_scale.config.load import load
from amclr_scale.errors import UserError

EVALUATOR = SimpleNamespace(tasks=[SimpleNamespace(name="photos"), SimpleNamespace(name="a/b")], probes=[])
TEACHER = ["model.momentum={decay: 0.9}", "evaluation.momentum=true"]


def test_the_best_checkpoint_is_by_a_number_that_is_measured_on_the_way():
    plain, averaged = load("configs/quickstart.yaml"), load("configs/quickstart.yaml", TEACHER)
    never = plain.model_copy(update={"evaluation": plain.evaluation.model_copy(update={"every_samples": None})})

    def checked(best, config=plain, evaluator=EVALUATOR):
        checkpoint = config.checkpoint.model_copy(update={"best": best})
        check_best(config.model_copy(update={"checkpoint": checkpoint}), evaluator)

    checked(None, evaluator=None)
    for best in ("photos/image_to_text_R@1", "a/b/zero_shot_top1"):
        checked(best)
        checked(f"momentum/{best}", averaged)
    for best in ("photos/imagetotext", "image_to_text_R@1", "b/zero_shot_top1", "momentum/photos/image_to_text_R@1"):
        with pytest.raises(UserError, match=r"^checkpoint\.best: expected SPLIT/NUMBER, such as photos/.*, got "):
            checked(best)
    for config, evaluator in ((never, EVALUATOR), (plain, None)):
        with pytest.raises(UserError, match=r"^checkpoint\.best: expected evaluation\.splits and evaluation\.every"):
            checked("photos/image_to_text_R@1", config, evaluator)
