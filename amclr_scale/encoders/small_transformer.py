"""A text transformer for small machines: 0.3 M parameters at width 64, one block, 4,096 words.

Vaswani et al., "Attention Is All You Need", NIPS 2017, arXiv:1706.03762, with the norms before each part
(Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML 2020, arXiv:2002.04745), learned
positions and attention in both directions. Padding is masked, so it never changes a feature beyond rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def initialise(self, share: float) -> None:
        """Weights that keep the size of what passes; those that add to the stream are `share` of that."""
        for linear, size in ((self.qkv, 1.0), (self.out, share), (self.up, 1.0), (self.down, share)):
            nn.init.normal_(linear.weight, std=size * linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        b, L, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, L, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (b, heads, L, width / heads)
        p = self.dropout if self.training else 0.0
        attended = (
            F.scaled_dot_product_attention(q, k, v, visible[:, None, None, :], p).transpose(1, 2).reshape(b, L, width)
        )
        x = x + F.dropout(self.out(attended), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class SmallTransformer(nn.Module):
    """Token ids (b, L) and which of them are not padding (b, L) -> features of all tokens (b, L, width)."""

    def __init__(self, width: int, layers: int, heads: int, *, vocab_size: int, context_length: int, dropout: float):
        super().__init__()
        self.width = width
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context_length, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.01)
        for module in self.modules():
            if isinstance(module, Block):
                module.initialise(1 / (2 * layers) ** 0.5)  # the sum of 2 `layers` parts keeps its size

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        for layer in self.layers:
            x = layer(x, visible)
        out: Tensor = self.norm(x)
        return out
