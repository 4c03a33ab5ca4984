"""Names of the rules by which captions become wrong ones (data/captions/hard_captions.py). Imports no torch."""

TEXT_RULES = ("words", "attribute", "number")
