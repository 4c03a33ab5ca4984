"""Projection heads: from a tower's features to the common space."""

from torch import nn

from amclr_scale.errors import UserError


def build_head(kind: str, width: int, embedding_width: int, dropout: float) -> nn.Module:
    """(b, width) -> (b, D).

    Args:
        kind: linear (one matrix, no bias, as in CLIP) or mlp (two layers with GELU between, hidden width = width), or
            none, where features are the embedding.
        dropout: probability of dropping a feature before the head.

    Raises:
        UserError: none, and the widths differ.
    """
    if kind == "none":
        if width != embedding_width:
            raise UserError(
                f"model.embedding_width: expected {width}, the width of features that no head projects, got "
                f"{embedding_width}"
            )
        return nn.Sequential(nn.Dropout(dropout))
    last = nn.Linear(width, embedding_width, bias=False)
    nn.init.normal_(last.weight, std=width**-0.5)
    if kind == "linear":
        return nn.Sequential(nn.Dropout(dropout), last)
    hidden = nn.Linear(width, width)
    nn.init.normal_(hidden.weight, std=width**-0.5)
    nn.init.zeros_(hidden.bias)
    return nn.Sequential(nn.Dropout(dropout), hidden, nn.GELU(), last)
