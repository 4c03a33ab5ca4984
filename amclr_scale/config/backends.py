"""Who can compute blocks of similarities, by name. Imports no torch.

A further backend is one file with a class like `TorchBlocks` and a `Backend` that describes it, and one line here
(docs/similarity.md).
"""

SIMILARITY_BACKENDS: dict[str, str] = {
    "triton": "amclr_scale.similarity.backends:TRITON",
    "torch": "amclr_scale.similarity.backends:TORCH",
}
"""Name -> module:attribute of its `Backend`. `auto` tries them in this order on CUDA; elsewhere it takes torch."""
