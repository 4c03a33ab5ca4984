"""The parts of a batch: what workers make, how it comes to the rank, and becomes one batch there."""
