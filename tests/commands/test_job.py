"""What a job is asked for and cannot give is told before it starts."""

from types import SimpleNamespace

import pytest

from amclr_scale.commands.job import check_best
from amclr_scale.config.load import load
from amclr_scale.errors import UserError

PHOTOS = SimpleNamespace(name="photos", retrieval=True, class_names=[], split=SimpleNamespace(num_samples=9))
CLASSES = SimpleNamespace(name="a/b", retrieval=False, class_names=["cat", "dog"], split=SimpleNamespace(num_samples=9))
EVALUATOR = SimpleNamespace(tasks=[PHOTOS, CLASSES], probes=[])
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
    for best in (
        "photos/zero_shot_top1", "photos/R@1", "photos/alignment", "photos/token_R@mean", "photos/composition_order",
        "photos/probe_top1", "a/b/image_to_text_R@1", "a/b/zero_shot_top5",
    ):  # fmt: skip
        split, _, number = best.rpartition("/")
        with pytest.raises(
            UserError, match=rf"^checkpoint\.best: expected a number that is measured of {split} \(.*, got {number}$"
        ):
            checked(best)
    measured = load("configs/quickstart.yaml", ["evaluation.geometry=true", "evaluation.evaluators=[token_retrieval]"])
    for best in ("photos/alignment", "photos/token_R@mean", "photos/R@mean", "photos/image_to_text_median_rank"):
        checked(best, measured)
    pair = SimpleNamespace(name="photos", retrieval=True, class_names=[], split=SimpleNamespace(num_samples=1))
    with pytest.raises(UserError, match="a number that is measured of photos"):  # one pair has no geometry
        checked("photos/alignment", measured, SimpleNamespace(tasks=[pair], probes=[]))
    mine = load("configs/quickstart.yaml", ["evaluation.evaluators=[mine]"])
    checked("photos/composition_order", mine)  # what an evaluator of the user's own measures is not known
    for config, evaluator in ((never, EVALUATOR), (plain, None)):
        with pytest.raises(UserError, match=r"^checkpoint\.best: expected evaluation\.splits and evaluation\.every"):
            checked("photos/image_to_text_R@1", config, evaluator)
