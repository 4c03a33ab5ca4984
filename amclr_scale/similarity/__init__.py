"""Exact contrastive statistics over all ranks, with memory linear in the batch."""

from amclr_scale.distributed.collectives import Group, all_gather, all_sum, gather, group, rank, world_size
from amclr_scale.similarity.backends import describe
from amclr_scale.similarity.contrast import Contrast, Side, contrast
from amclr_scale.similarity.gram import column_mean, gram
from amclr_scale.similarity.groups import SameGroup
from amclr_scale.similarity.keys import ExtraKeys
from amclr_scale.similarity.nearest import top_k
from amclr_scale.similarity.pairwise import pairwise
from amclr_scale.similarity.rows.functions import map_rows, mean_rows
from amclr_scale.similarity.rows.softmaxes import softmaxes
from amclr_scale.similarity.settings import Settings, configure, current, using
from amclr_scale.similarity.token_contrast import token_contrast

__all__ = [
    "Contrast",
    "ExtraKeys",
    "Group",
    "SameGroup",
    "Settings",
    "Side",
    "all_gather",
    "all_sum",
    "column_mean",
    "configure",
    "contrast",
    "current",
    "describe",
    "gather",
    "gram",
    "group",
    "map_rows",
    "mean_rows",
    "pairwise",
    "rank",
    "softmaxes",
    "token_contrast",
    "top_k",
    "using",
    "world_size",
]
