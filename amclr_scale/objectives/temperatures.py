"""Temperatures of single samples, learned by stochastic gradient descent on the dual variable of a robust loss.

For anchor i with estimator u_i, old temperature t_i and radius rho (estimator.py defines g, u, and E = mean of x):

    r_i  = log u_i + rho - (g_i / u_i) E_i            the gradient of t_i (log u_i + rho) in t_i
    v_i <- (1 - beta) v_i + beta clip(r_i, +-clip)
    t_i <- clip(t_i - eta v_i, t_min, t_max)

With u_i = g_i, r_i is rho - KL(softmax of x_i || uniform). Features see the old temperature; the new one counts from
the sample's next visit on.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from amclr_scale.objectives.base import refuse_unread, require
from amclr_scale.objectives.estimator import EstimatorOptions


def temperature_gradient(log_u: Tensor, log_g: Tensor, expected: Tensor, rho: float) -> Tensor:
    """The gradient r above, without gradient of its own; any shape. 0 of an anchor without keys."""
    log_g = log_g.detach()
    return torch.where(log_g.isneginf(), 0.0, log_u + rho - (log_g - log_u).exp() * expected)


def spread(image_temperatures: Tensor, text_temperatures: Tensor) -> dict[str, Tensor]:
    """What is logged of a batch's temperatures: mean and standard deviation of each modality's."""
    sides = {"image": image_temperatures, "text": text_temperatures}
    means = {f"temperature_{side}": t.mean() for side, t in sides.items()}
    return means | {f"temperature_{side}_std": t.std(correction=0) for side, t in sides.items()}


def check_robust(rho: float, first: float, lowest: float, highest: float) -> None:
    """Raise where a radius is negative, or samples would start outside the bounds on their temperatures."""
    require(rho >= 0, "rho", "a divergence of at least 0", rho)
    within = f"a number from temperature_min {lowest:g} to temperature_max {highest:g}"
    require(lowest <= first <= highest, "temperature", within, first, fix="widen the bounds or start inside")


@dataclass(frozen=True)
class Descent:
    """The rule that turns r into the next temperature."""

    eta: float  # step size
    beta: float  # weight of the newest gradient in v
    clip: float  # bound on |r|
    lowest: float  # bounds on the temperature
    highest: float
    schedule: Literal["constant", "cosine", "exponential"] = "constant"
    eta_min: float = 0.0
    num_epochs: float | None = None

    def __post_init__(self) -> None:
        require(self.eta >= 0, "eta", "a step size of at least 0", self.eta)
        require(self.eta_min >= 0, "eta_min", "a step size of at least 0", self.eta_min)
        require(0 < self.beta <= 1, "beta", "a weight in (0, 1]", self.beta)
        require(self.clip > 0, "gradient_clip", "a positive bound", self.clip)
        require(
            0 < self.lowest <= self.highest, "temperature_min", "0 < temperature_min <= temperature_max", self.lowest
        )
        require(
            self.schedule != "cosine" or (self.num_epochs is not None and self.num_epochs > 0),
            "eta_epochs",
            "a positive number of epochs for the cosine schedule",
            self.num_epochs,
        )

    def eta_at(self, epoch: float) -> float:
        """The step size, one value per epoch: constant, a quarter of a cosine, or 0.8 times the last epoch's excess."""
        whole, excess = math.floor(epoch), self.eta - self.eta_min
        if self.schedule == "cosine":
            assert self.num_epochs is not None, "__post_init__ refuses this"
            return self.eta_min + excess * math.cos(math.pi / 2 * min(whole / self.num_epochs, 1.0))
        if self.schedule == "exponential":
            return self.eta_min + excess * 0.8 ** (whole - 1)  # counts from 1, as published: epoch 0 takes 1.25 eta
        return self.eta

    def step(self, temperature: Tensor, v: Tensor, r: Tensor, epoch: float) -> tuple[Tensor, Tensor]:
        """The next (temperature, v), of the shape of r."""
        v = (1 - self.beta) * v.to(r) + self.beta * r.clamp(-self.clip, self.clip)
        return (temperature.to(r) - self.eta_at(epoch) * v).clamp(self.lowest, self.highest), v


@dataclass(frozen=True, kw_only=True)
class RobustOptions(EstimatorOptions):
    """Options of an objective that learns a temperature for every sample."""

    temperature: float = 0.01  # every sample's first temperature
    rho: float = 8.0  # radius of the robust loss: the KL divergence that temperatures aim at
    eta: float = 0.03  # step size of the temperatures
    eta_schedule: Literal["constant", "cosine", "exponential"] = "constant"  # by epoch
    eta_min: float = 0.0001  # where the schedules of eta end
    eta_epochs: float | None = None  # epochs the cosine of eta takes
    beta: float = 0.9  # weight of the newest gradient in the temperatures' moving average
    gradient_clip: float = 5.0  # bound on a temperature's gradient
    temperature_min: float = 0.005  # bounds of the temperatures
    temperature_max: float = 0.05

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", "a positive number", self.temperature)
        super().__post_init__()
        self.descent()
        refuse_unread(self, () if self.eta_schedule == "cosine" else ("eta_epochs",), "eta_schedule cosine")
        falls = self.eta_schedule != "constant"
        refuse_unread(self, () if falls else ("eta_min",), "eta_schedule cosine or exponential")
        check_robust(self.rho, self.temperature, self.temperature_min, self.temperature_max)

    def descent(self) -> Descent:
        """The temperatures' rule."""
        return Descent(
            self.eta,
            self.beta,
            self.gradient_clip,
            self.temperature_min,
            self.temperature_max,
            self.eta_schedule,
            self.eta_min,
            self.eta_epochs,
        )
