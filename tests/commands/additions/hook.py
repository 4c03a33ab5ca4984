"""A hook of one's own: the mean of the learned scale over all steps, which a resumed run goes on with."""

import torch

from amclr_scale.commands.job import HOOKS, Job
from amclr_scale.engine.hooks import Hook


class MeanScale(Hook):
    name = "mean_scale"

    def __init__(self, job: Job):
        self.model, self.sum, self.steps = job.trainer.model, torch.zeros((), dtype=torch.float64), torch.tensor(0)

    def after_step(self, done):
        self.sum += float(self.model.logit_scale.detach())
        self.steps += 1

    def on_end(self):
        return {"mean_scale": float(self.sum / self.steps), "mean_scale_steps": float(self.steps)}

    def state_dict(self):
        return {"sum": self.sum, "steps": self.steps}

    def load_state_dict(self, state):
        self.sum, self.steps = state["sum"], state["steps"]


HOOKS.append(MeanScale)
