"""Frozen towers whose features come from files: they rest, once it is known that the files are of them.

Training with such files leaves the same numbers as training that runs the towers, to the rounding of their forward in
micro-batches of another size.
"""

from collections.abc import Mapping

from amclr_scale.config.schema import Config
from amclr_scale.data.beside.features import Features
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.resting import RestingTower, digest


def rest_towers(model: DualEncoder, config: Config, features: Mapping[str, Features]) -> None:
    """Let the towers of these sides rest. The model is on the host, with its weights, before an engine is built.

    Raises:
        UserError: the features are of other weights, or of another precision.
    """
    for side, file in features.items():
        tower = digest(getattr(model, f"{side}_tower"))
        file.check_tower(tower, config.execution.precision, model.widths[side])
        model.rest(side)
        held = getattr(model, f"{side}_tower")
        assert isinstance(held, RestingTower)
        model.notes += (
            f"data.features.{side}: the {side} tower rests on the host ({held.bytes / 2**20:,.0f} MiB) and comes to "
            "the device for evaluation",
        )
