"""Two numbers of one's own that rankings give: the mean reciprocal rank, a share, and the mean rank, which is none."""

from amclr_scale.metrics.scores import RETRIEVAL, Score

RETRIEVAL.scores["MRR"] = Score("MRR", of=lambda ranks: 1 / ranks.double(), drawn=True)
RETRIEVAL.scores["mean_rank"] = Score("mean rank", "ranks", lower_is_better=True, of=lambda ranks: ranks)
