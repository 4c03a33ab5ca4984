"""Distributed large-batch contrastive learning: write the recipe once, run it on a laptop or on 64 nodes."""

__version__ = "0.1.0"
