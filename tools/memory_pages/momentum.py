"""The order of a momentum encoder's forward and the student's: what it costs, and what going first saves.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, arXiv:1911.05722: a second
copy of the towers encodes the keys without gradients. Where its forward runs AFTER the student's, its working set comes
on top of all that the student keeps for its backward; where it runs BEFORE, that memory is free again by then.

    none         P + max(student's forward, backward)
    before       P + P' + max(teacher's forward, outputs + max(student's forward, backward))
    after        P + P' + max(student's forward, kept + teacher's forward, outputs + backward)
    forgotten    P + P' + kept + max(student's forward, backward), where no_grad was left out

with P, P' the parameters of student and teacher. Going first saves nothing once backward is the larger side: with
activation recomputation, for one.
"""

from dataclasses import dataclass

from amclr_scale.memory.towers import Tower


@dataclass(frozen=True)
class MomentumPeaks:
    """Most bytes of one tower's step, with its parameters and gradients, by the order of the two forwards."""

    none: int
    before: int
    after: int
    forgotten: int

    @property
    def saving(self) -> int:
        """Bytes that the momentum encoder's forward saves by going first."""
        return self.after - self.before


def momentum_peaks(tower: Tower, m: int, *, parameter_bytes: int, output_bytes: int) -> MomentumPeaks:
    """Peaks for a micro-batch.

    Args:
        tower: as traced, with its recomputation.
        m: samples of the micro-batch.
        parameter_bytes: of the tower's parameters; the momentum copy takes as much.
        output_bytes: of the micro-batch's features, which stay until the loss.
    """
    student, teacher = tower.with_graph, tower.without_graph.forward_peak(m).activations
    forward, kept = student.forward_peak(m).activations, student.kept(m)
    backward = sum(student.backward_peak(m, first=True))
    both = 2 * parameter_bytes
    return MomentumPeaks(
        none=parameter_bytes + max(forward, backward),
        before=both + max(teacher, output_bytes + max(forward, backward)),
        after=both + max(forward, kept + teacher, output_bytes + backward),
        forgotten=both + max(kept + forward, kept + backward),
    )
