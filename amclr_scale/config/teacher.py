"""What an objective borrows of a teacher (`model.momentum`). Imports no torch."""

from typing import Literal

from amclr_scale.config.objective_options import declared
from amclr_scale.config.schema import Config

Side = Literal["image", "text"]
SIDES: tuple[Side, ...] = ("image", "text")


def lent_sides(config: Config) -> tuple[Side, ...]:
    """Of which sides a teacher encodes every batch, because the objective reads image_momentum or text_momentum."""
    if config.model.momentum is None:
        return ()
    inputs = declared(config.objective).inputs
    return tuple(side for side in SIDES if inputs.count(f"{side}_momentum"))


def lends_layers(config: Config) -> bool:
    """Whether it lends features of inner layers too."""
    return bool(lent_sides(config) and declared(config.objective).inputs.count("image_momentum_layers"))
