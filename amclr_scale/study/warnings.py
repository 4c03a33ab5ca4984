"""What makes a study say less than it seems to: told before it costs anything."""

from collections.abc import Iterator, Sequence

from amclr_scale.study.cells import Planned
from amclr_scale.study.plan import StudyPlan

FEW_STEPS = 500
LEARNING_RATES = 5  # values of a sweep from which a best one may be taken


def warnings(plan: StudyPlan, cells: Sequence[Planned], epoch: float) -> Iterator[str]:
    """One line each."""
    few = min(cells, key=lambda cell: cell.steps)
    if few.steps < FEW_STEPS:
        yield (
            f"{few.steps} optimizer steps at a global batch of {few.global_batch_size}: with so few, a large batch "
            "loses by training too little, not by its negatives (30 epochs of 100,000 pairs are 90 steps at 32,768); "
            "run held_equal: steps beside it"
        )
    large = sorted({cell.global_batch_size for cell in cells if cell.global_batch_size > epoch})
    if large:
        yield f"global batch {large[0]} is larger than the data set of {epoch:,.0f}: samples meet themselves in it"
    costly = sorted({cell.label for cell in cells if cell.encoder_cost > 1})
    if costly and plan.held_equal in ("samples", "steps") and any(cell.encoder_cost == 1 for cell in cells):
        most = max(cell.encoder_cost for cell in cells)
        yield (
            f"{', '.join(costly)}: up to {most:g} times the encoder work of the other arms at equal {plan.held_equal}; "
            "run held_equal: compute beside it"
        )
    pretrained = [
        key for key, value in (
            ("model.image.weights", cells[0].config.model.image.weights),
            ("model.text.pretrained", cells[0].config.model.text.pretrained),
        ) if value
    ]  # fmt: skip
    if pretrained:
        yield (
            f"{', '.join(pretrained)}: towers that were trained before may have seen the test set; results are no "
            "longer zero-shot, and differences between arms shrink"
        )
    if "optimizer.lr" not in plan.axes and not all("optimizer.lr" in arm.axes for arm in plan.arms):
        yield (
            "one learning rate per batch size: an arm may win because it suits that rate; the fair curve takes the "
            f"best of {LEARNING_RATES} or more per cell (axes: {{optimizer.lr: [...]}})"
        )
