"""The training loop: data, step, hooks, until the recipe's samples are seen."""

from collections.abc import Iterator, Sequence

from amclr_scale.engine.batch_plan import Plan
from amclr_scale.engine.hooks import Hook
from amclr_scale.engine.step import TrainStep
from amclr_scale.types import Batch


def train(
    step: TrainStep, batches: Iterator[Batch], plan: Plan, hooks: Sequence[Hook], *, begin: int = 0
) -> dict[str, float]:
    """Run the recipe to its end on every rank; returns what the hooks have to say in the end.

    Args:
        batches: this rank's shares, the next step's first.
        hooks: told of every step, in this order; any of them may raise to end the run.
        begin: steps that are done already.
    """
    step.steps = begin  # which its teacher's course and its messages go by
    for number in range(begin + 1, plan.total_steps + 1):
        done = plan.position(number)
        step.objective.set_epoch(plan.epoch(number - 1))
        with step.phases("data", host=True):
            batch = next(batches)
        report = step(batch, done.lr)
        if number == begin + 1:
            for hook in hooks:
                hook.on_first_step()
        for hook in hooks:
            hook.on_step(done, batch, report)
        del report  # embeddings and their gradients, which the next step need not find in its way
        for hook in hooks:
            hook.after_step(done)
    return {name: value for hook in hooks for name, value in hook.on_end().items()}
