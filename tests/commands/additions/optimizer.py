"""An optimizer of one's own: steps of one length along the sign of a mean of gradients, shorter as they go on.

Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018, arXiv:1802.04434.
"""

import torch

from amclr_scale.config.optimizers import RULES, UpdateRule
from amclr_scale.config.section import Fraction, Section


class Options(Section):
    forget: Fraction = 0.9
    """Decay of the mean."""


class Signum(torch.optim.Optimizer):
    def __init__(self, groups, lr, forget):
        super().__init__(groups, {"lr": lr, "forget": forget})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean"], state["step"] = torch.zeros_like(p), torch.zeros(())
                state["step"] += 1
                state["mean"].lerp_(p.grad, 1 - group["forget"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(state["mean"].sign(), alpha=group["lr"] / float(state["step"]))


def build(o, groups, where):
    return Signum(groups, o.lr, Options(**o.options).forget), "our own Signum"


RULES["signum"] = UpdateRule(
    f"{__name__}:build", "us", lambda _: 1, options=Options, stages=(0, 1, 2), on_cuda="one by one"
)
