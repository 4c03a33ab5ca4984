"""FastCLIP v0 to v3: SogCLR's estimator with a falling gamma, and four ways to set the temperature.

Wei et al., "FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP Training with Limited Resources", 2024,
arXiv:2407.01445.

With g, u as in SogCLR (estimator.py) and f_i = log(u_i + eps), the objective is

    v0   mean (f_i + f'_i) / 2                          t global, learned
    v1   mean (f_i + f'_i) / 2                          t global, fixed
    v2   mean (t_i (f_i + rho) + t'_i (f'_i + rho)) / 2 t per sample, by Adam with a step count of its own
    v3   t (rho + mean (f_i + f'_i) / 2)                t global, learned

and each value is its estimator: u constant, so that with w_i = g_i / (u_i + eps) and m_i = 1, 1, t_i, t (constant)

    value = mean (m_i w_i + m'_i w'_i) / 2   (v3: + t (rho + mean (f_i + f'_i) / 2), u constant)

This is half of SogCLR's sum over modalities. The gradient of v3's temperature is rho + mean (f - w E + f' - w' E') / 2.

`compat` reproduces the published code instead: the value is twice mean m w / 2, with the same feature gradient; the
softmax part of the learned temperature's gradient is doubled; v2 lacks the factor t_i, corrects Adam's bias by
epochs, and adds eps to u divided by exp(the sample's largest exponent so far); slots with u < 1e-35 start afresh.

Numerics: log u, so the published overflow at small temperatures cannot happen; with gamma = 1 the value is constant
(1 in v0), and `metrics["objective"]` is the number to watch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from amclr_scale.objectives.base import Layout, at_least_float32, learned_temperature, numbers, refuse_unread, require
from amclr_scale.objectives.estimator import (
    Average,
    Centred,
    EstimatorOptions,
    KeepsEstimates,
    centred,
    two_states,
    two_visits,
)
from amclr_scale.objectives.temperatures import check_robust, temperature_gradient
from amclr_scale.similarity import map_rows
from amclr_scale.types import Embeddings, Loss

OF_V2 = ("temperature_lr", "temperature_min", "temperature_max", "gradient_clip")
BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8
LOG_UNSEEN = math.log(1e-35)  # compat: a smaller u counts as never visited


class FastCLIP(KeepsEstimates, name="fastclip"):
    """Global contrastive loss with a falling inner step and a temperature global or per sample, fixed or learned."""

    @dataclass(frozen=True, kw_only=True)
    class Config(EstimatorOptions):
        """Options of `fastclip`."""

        version: Literal["v0", "v1", "v2", "v3"] = "v3"  # see above
        temperature: float | None = None  # v1: fixed (null: 0.07); v2: every sample's first (null: 0.03); v0, v3: null
        gamma: float = 0.2  # weight of the newest batch in u, at the end of the schedule
        gamma_schedule: Literal["constant", "cosine", "visits", "scent"] = (
            "cosine"  # cosine: from 1 in epoch 0 to gamma
        )
        gamma_epochs: float | None = 18.0  # epochs the cosine takes
        rho: float | None = None  # radius of the robust losses v2 (null: 7.0) and v3 (null: 6.5)
        eps: float = 1e-14  # added to u
        temperature_lr: float = 0.0133  # v2: Adam's step size
        temperature_min: float = 0.01  # v2: bounds of the temperatures
        temperature_max: float = 1.0
        gradient_clip: float = 5.0  # v2: bound on a temperature's gradient
        compat: bool = False  # reproduce the published code, its faults included

        def __post_init__(self) -> None:
            super().__post_init__()
            learned = self.version in ("v0", "v3")
            require(
                self.temperature is None or (not learned and self.temperature > 0),
                "temperature",
                f"null for {self.version}, which learns logit_scale" if learned else "a positive number",
                self.temperature,
            )
            published = not self.compat or self.gamma_schedule in ("constant", "cosine")
            require(published, "gamma_schedule", "constant or cosine with compat, as published", self.gamma_schedule)
            require(self.eps > 0, "eps", "a positive number", self.eps)
            require(self.gradient_clip > 0, "gradient_clip", "a positive bound", self.gradient_clip)
            low, high = self.temperature_min, self.temperature_max
            require(0 < low <= high, "temperature_min", "0 < temperature_min <= temperature_max", low)
            require(self.temperature_lr >= 0, "temperature_lr", "a step size of at least 0", self.temperature_lr)
            if self.version == "v2":
                check_robust(self.radius, self.first_temperature, low, high)
            require(self.radius >= 0, "rho", "a divergence of at least 0", self.rho)
            robust = self.version in ("v2", "v3")
            require(robust or self.rho is None, "rho", f"null for {self.version}, which has no robust loss", self.rho)
            refuse_unread(self, () if self.version == "v2" else OF_V2, "version v2")

        @property
        def radius(self) -> float:
            """The option rho, or the version's own."""
            return self.rho if self.rho is not None else {"v2": 7.0, "v3": 6.5}.get(self.version, 0.0)

        @property
        def first_temperature(self) -> float:
            """The option temperature, or the version's own; 0 where the model learns it."""
            return self.temperature or {"v1": 0.07, "v2": 0.03}.get(self.version, 0.0)

    config: Config

    def __init__(self, config: Config, sample_state: Layout = "auto") -> None:
        super().__init__(config)
        self.rho, self.first_temperature = config.radius, config.first_temperature
        columns = config.columns()
        if config.version == "v2":
            columns |= {"temperature": self.first_temperature, "m": 0.0, "v": 0.0, "visits": 0.0}
            if config.compat:
                columns |= {"bound": 0.0}
        self.image_state, self.text_state = two_states(config.num_samples, config.num_texts, columns, sample_state)

    def forward(self, embeddings: Embeddings) -> Loss:
        config, per_sample = self.config, self.config.version == "v2"
        visits = two_visits(embeddings, self.image_state, self.text_state)
        olds = [visit.read() for visit in visits]
        if per_sample:
            image_t, text_t = (old["temperature"] for old in olds)  # (b,)
        elif config.version == "v1":
            image_t = text_t = at_least_float32(embeddings.image).new_tensor(self.first_temperature)
        else:
            image_t = text_t = torch.as_tensor(learned_temperature(embeddings, None)).squeeze()
        sides = centred(embeddings.image, embeddings.text, (image_t, text_t), self.masks(embeddings))

        ws: list[Tensor] = []  # (b,) each
        fs: list[Tensor] = []
        gammas: list[float | Tensor] = []
        rows = ((embeddings.image, embeddings.text), (embeddings.text, embeddings.image))
        for side, visit, old, (anchors, keys) in zip(sides, visits, olds, rows, strict=True):
            average = self._rule(old)
            gammas.append(average.mean_gamma)
            new = self._average(average, side, old, anchors, keys)
            log_eps = torch.full_like(new["log_u"], math.log(config.eps))
            f = torch.logaddexp(new["log_u"], log_eps + new["bound"] if "bound" in new else log_eps)
            if self.learns:
                new |= config.counted(old, side.log_g)
                if per_sample:
                    new |= self._adam(old, temperature_gradient(f, side.log_g, side.expected, self.rho))
                visit.write(**new)
            ws.append((side.log_g - f).exp())
            fs.append(new["log_u"] if config.compat and config.version == "v3" else f)  # published without eps there

        value, objective = self._value(sides, ws, fs, image_t.to(ws[0].dtype), text_t.to(ws[0].dtype))
        return Loss(
            value,
            numbers(
                objective=objective,
                temperature_image=image_t.mean(),
                temperature_text=text_t.mean(),
                gamma=gammas[0],
            ),
        )

    def _rule(self, old: dict[str, Tensor]) -> Average:
        if self.config.compat and self.epoch < 1:
            return Average(1.0)
        return self.config.average(old, self.epoch)

    def _average(
        self, average: Average, side: Centred, old: dict[str, Tensor], anchors: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """The next log u, and with it the bound on exponents that compat v2 subtracts."""
        log_u = old["log_u"]
        if not self.config.compat:
            return {"log_u": average(log_u, side.log_g.detach())}
        started = log_u - old["bound"] if "bound" in old else log_u
        log_u = log_u.masked_fill(started < LOG_UNSEEN, -math.inf)
        new = {"log_u": average(log_u, side.log_g.detach())}
        if "bound" in old:
            largest = _largest_gap(anchors.detach(), keys.detach()) / old["temperature"]
            new["bound"] = torch.maximum(old["bound"], largest)
        return new

    def _value(
        self, sides: tuple[Centred, Centred], ws: list[Tensor], fs: list[Tensor], image_t: Tensor, text_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(value, objective) as in the module's docstring; both temperatures are the same tensor but in v2."""
        version, compat = self.config.version, self.config.compat
        mean_f = (fs[0] + fs[1]).mean() / 2
        if version == "v2":
            objective = (image_t * (fs[0] + self.rho) + text_t * (fs[1] + self.rho)).mean() / 2
        else:
            objective = image_t.detach() * (self.rho + mean_f) if version == "v3" else mean_f

        by_t = version == "v3" or (version == "v2" and not compat)
        image_m, text_m = (image_t.detach(), text_t.detach()) if by_t else (1.0, 1.0)
        half = (image_m * ws[0] + text_m * ws[1]).mean() / 2
        value = half
        if compat:
            if version in ("v0", "v3"):  # the softmax part of the temperature's gradient once more
                m_over_t = 1.0 if by_t else 1 / image_t.detach()
                again = (ws[0].detach() * sides[0].expected + ws[1].detach() * sides[1].expected).mean() / 2
                value = value - m_over_t * again * (image_t - image_t.detach())
            value = value + half.detach()
        if version == "v3":
            value = value + image_t * (self.rho + mean_f)
        return value, objective

    def _adam(self, old: dict[str, Tensor], r: Tensor) -> dict[str, Tensor]:
        """One step of Adam for the temperatures of this step's samples."""
        config, clipped = self.config, r.clamp(-self.config.gradient_clip, self.config.gradient_clip)
        visits = old["visits"].to(r) + 1
        whole_epoch = math.floor(self.epoch)
        first = config.compat and whole_epoch == 0
        beta1, beta2 = (0.0, 0.0) if first else (BETA1, BETA2)
        power = torch.full_like(visits, whole_epoch + 1) if config.compat else visits
        m = beta1 * old["m"].to(r) + (1 - beta1) * clipped
        v = beta2 * old["v"].to(r) + (1 - beta2) * clipped.square()
        step = (m / (1 - beta1**power)) / ((v / (1 - beta2**power)).sqrt() + ADAM_EPS)
        t = (old["temperature"].to(r) - config.temperature_lr * step).clamp(
            config.temperature_min, config.temperature_max
        )
        return {"temperature": t, "m": m, "v": v, "visits": visits}


def _largest_gap(anchors: Tensor, keys: Tensor) -> Tensor:
    """max_j s_ij - s_ii over all keys, the positive's 0 included: (b,)."""

    def rows(block: Tensor, positive: Tensor) -> tuple[Tensor, ...]:
        return (block.amax(1) - block.gather(1, positive[:, None])[:, 0],)

    return map_rows(rows, anchors, keys)[0]
