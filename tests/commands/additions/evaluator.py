"""An evaluator of one's own: how near an image is to its caption."""

from amclr_scale.evaluation.evaluators import EVALUATORS, NOTHING
from amclr_scale.evaluation.numbers import number
from amclr_scale.evaluation.shares import gather_rows
from amclr_scale.metrics.scores import GROUPS, Group, Score


def nearness(seen):
    if not seen.task.retrieval:
        return NOTHING
    cosine = gather_rows((seen.image * seen.caption).sum(1)).cpu()
    return {"pairs_cosine": number(cosine.double(), chance=0.0)}, {"pairs_least": float(cosine.min())}


EVALUATORS["nearness"] = nearness
GROUPS.append(Group("nearness", {"pairs": "of pairs"}, {"cosine": Score("cosine", ""), "least": Score("least", "")}))
