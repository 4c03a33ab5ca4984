"""AmorLIP: the partition function of each anchor from a light network per modality, trained in steps of its own.

Sun et al., "AmorLIP: Efficient Language-Image Pretraining via Amortization", 2025, arXiv:2505.18983.

With x_ij = s_ij / t, a weight p of the positive's exponential, and Lam(z) a residual network on unit embeddings:

    T_i     = log( sum_{j != i} exp(x_ij) + p exp(x_ii) )                                      this batch's
    y_i     = log( beta exp(Lam_before(z_i)) + (1 - beta) exp(T_i) )        mixed with the last epoch's network
    inner     `inner_steps` steps of Adam on mean_i (Lam(z_i) - y_i)^2 + the texts', embeddings held  (fit: log_l2)
              or on a tenth of that + mean_i exp(T_i - Lam(z_i)) (T_i - Lam(z_i))                     (fit: kl)
    value     t mean_i ( exp(T_i - lam_i) - x_ii ) + the texts' + rho t                 lam held, and the first t
    lam_i     y_i (estimate: mixture), or the moving average of the network (estimate: network)

    Lam(f)  = w . relu(h_2 + f) + w_0,   h_1 = norm(relu(A_1 f + a_1)),   h_2 = norm(relu(A_2 h_1 + a_2))

beta grows from 0 in epoch 0 to `beta_max` in epoch `beta_epochs` along a cosine. The network's moving average follows
every second step; at the end of an epoch it becomes Lam_before, and the network begins anew.

Published mixtures read the network only through Lam_before, so in epoch 0, where beta is 0, lam = T: the gradient is
then twice t times that of log(sum_{j != i} exp(x_ij) + p exp(x_ii)) - x_ii, which at p = 1 is CLIP.

Numerics: logarithms, so nothing overflows; the network in float32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.objectives.base import Objective, at_least_float32, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.inner import Inner, Shapes, Weights, adam
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings, Loss

SIDES = ("image", "text")
BUFFERS = ("weights", "first", "second", "average", "before")


class AmorLIP(Objective, name="amorlip"):
    """Contrastive loss whose partition functions come from a light network that is trained in inner steps."""

    whole_set_options: ClassVar[Mapping[str, Any]] = {"estimate": "batch"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `amorlip`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        positive: float = 0.001  # p, weight of the positive's exponential
        inner_steps: int = 3  # of the network, in each step of training
        inner_lr: float = 0.001  # Adam's
        fit: Literal["log_l2", "kl"] = "log_l2"  # what the network minimises
        estimate: Literal["mixture", "network", "batch"] = "mixture"  # lam; batch: T itself, the control
        beta_max: float = 0.8  # share of the last epoch's network in the mixture, at the end
        beta_epochs: float = 16.0  # epochs until then
        average: float = 0.92  # share of what it was in the network's moving average
        rho: float = 0.0  # weight of the temperature itself, where it is learned
        network_seed: int = 0  # of the network's first weights

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(self.positive >= 0, "positive", "a weight of at least 0", self.positive)
            require(self.inner_steps > 0, "inner_steps", "at least 1", self.inner_steps)
            for key in ("inner_lr", "beta_epochs"):
                require(getattr(self, key) > 0, key, "a positive number", getattr(self, key))
            for key in ("beta_max", "average"):
                require(0 <= getattr(self, key) < 1, key, "a share in [0, 1)", getattr(self, key))
            unused = self.temperature is None or self.rho == 0
            require(unused, "rho", "0 for a fixed temperature, which it says nothing about", self.rho)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.network = Inner(shapes, BUFFERS, ("steps", "inner", "passes", "begun"))

    def allocate(self, width: int) -> None:
        super().allocate(width)
        if self.config.estimate != "batch":
            self.network.make(width)

    def rehearse(self, width: int, slots: int) -> None:
        super().rehearse(width, slots)
        if self.config.estimate != "batch":
            self.network.make(width)
            self.network.counts |= {"steps": 1, "begun": 1, "passes": 1}
            self.epoch = 1.0

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        t = learned_temperature(embeddings, config.temperature)
        held = t.detach().squeeze() if isinstance(t, Tensor) else t
        masks = self.masks(embeddings).of()
        both = contrast(embeddings.image, embeddings.text, temperature=t, exclude_positive=True, centred=True, **masks)
        own = both.image.positive / t  # (b,): x_ii
        rest: list[Tensor] = []  # (b,): T_i - x_ii, of images and of texts
        for side in (both.image, both.text):
            log_sum = side.log_sum.masked_fill(side.log_sum.isneginf(), 0.0)
            if config.positive:
                log_sum = torch.logaddexp(log_sum, log_sum.new_tensor(math.log(config.positive)))
            rest.append(log_sum)
        some = [~side.log_sum.isneginf() for side in (both.image, both.text)]  # anchors with a key; others count 0
        targets = [(x + own).detach() for x in rest]
        lams = self._normalisers(embeddings, targets, some)

        terms: list[Tensor] = []
        apart: list[Tensor] = []
        for x, lam, y, here in zip(rest, lams, targets, some, strict=True):
            terms.append(torch.where(here, (x + own - lam).exp() - own, 0.0))
            apart.append(torch.where(here, (lam - y).abs(), 0.0))
        value = held * (terms[0] + terms[1]).mean()
        if config.temperature is None:
            value = value + config.rho * torch.as_tensor(t).sum()
        gains = [torch.where(here, x, 0.0).mean() for x, here in zip(rest, some, strict=True)]
        return Loss(
            value,
            numbers(
                objective=held * (gains[0] + gains[1]),
                temperature=held,
                beta=self._beta(),
                normaliser_against_batch=(apart[0] + apart[1]).mean() / 2,
            ),
        )

    @property
    def predicts(self) -> bool:
        """Whether estimates come from the network."""
        return self.config.estimate != "batch"

    @torch.no_grad()
    def log_means(self, embeddings: Embeddings, trained_with: int) -> tuple[Tensor, Tensor]:
        """The networks' estimates (b,) of the mean of exp(x_ij) over negatives, of images and of texts, as logarithms.

        With `estimate: batch` they are what the batch says; -inf before the first step.

        Args:
            embeddings: of any batch.
            trained_with: B, over whose negatives the networks have learned to sum.
        """
        features = [at_least_float32(x) for x in (embeddings.image, embeddings.text)]
        if self.predicts and not self.network.counts["begun"]:
            of_image, of_text = (x.new_full((len(x),), -math.inf) for x in features)
            return of_image, of_text
        if self.predicts:
            found = predicted(features, self.network.shaped(self.network.average))
            negatives: list[float | Tensor] = [math.log(trained_with - 1)] * 2
        else:
            t, masks = learned_temperature(embeddings, self.config.temperature), self.masks(embeddings).of()
            both = contrast(embeddings.image, embeddings.text, temperature=t, exclude_positive=True, **masks)
            positive, p = both.image.positive / t, self.config.positive
            found = [x.log_sum for x in (both.image, both.text)]
            if p:
                found = [torch.logaddexp(x, positive + math.log(p)) for x in found]
            negatives = [x.log_num_keys for x in (both.image, both.text)]
        of_image, of_text = (x - log_n for x, log_n in zip(found, negatives, strict=True))
        return of_image, of_text

    def _beta(self) -> float:
        progress = min(math.floor(self.epoch) / self.config.beta_epochs, 1.0)
        return self.config.beta_max * (1 - math.cos(math.pi * progress)) / 2

    def _normalisers(self, embeddings: Embeddings, targets: list[Tensor], some: list[Tensor]) -> list[Tensor]:
        """What lam is, (b,) of images and of texts; in training after the network's inner steps."""
        config, network, learns = self.config, self.network, self.learns
        if config.estimate == "batch":
            return targets
        features = [at_least_float32(x.detach()) for x in (embeddings.image, embeddings.text)]
        with torch.no_grad(), torch.autocast(features[0].device.type, enabled=False):
            if not network.width and learns:
                network.make(features[0].shape[1], features[0].device)
            if not network.width:
                return targets
            if learns:
                network.ready(features[0])
            state = {name: getattr(network, name).clone() for name in BUFFERS}
            counts = dict(network.counts)
            if learns:
                self._begin(state, counts)
            mixed = self._mixed(features, targets, network.shaped(state["before"]), counts)
            if learns:
                self._train(state, counts, features, targets, mixed, some)
                network.keep(counts, **state)
            if config.estimate == "mixture" or not counts["begun"]:
                return mixed
            return predicted(features, network.shaped(state["average"]))

    def _begin(self, state: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Before an epoch's first step: the last one's average is what is mixed in, and the network begins anew."""
        passes = math.floor(self.epoch)
        if counts["begun"] and passes == counts["passes"]:
            return
        if counts["begun"]:
            state["before"] = state["average"].clone()
        first = self.network.flat(initial(self.network.width, self.config.network_seed + passes))
        state["weights"], state["average"] = (first.to(state["weights"]) for _ in range(2))
        state["first"], state["second"] = (torch.zeros_like(state["weights"]) for _ in range(2))
        counts |= {"inner": 0, "passes": passes, "begun": 1 + bool(counts["begun"])}

    def _mixed(
        self, features: list[Tensor], targets: list[Tensor], before: Weights, counts: dict[str, int]
    ) -> list[Tensor]:
        beta = self._beta()
        if beta == 0 or counts["begun"] < 2:  # no epoch is over
            return targets
        pairs = zip(predicted(features, before), targets, strict=True)
        return [torch.logaddexp(math.log(beta) + old, math.log1p(-beta) + target) for old, target in pairs]

    def _train(
        self, state: dict[str, Tensor], counts: dict[str, int],
        features: list[Tensor], targets: list[Tensor], mixed: list[Tensor], some: list[Tensor],
    ) -> None:  # fmt: skip
        config = self.config

        def loss(at: Weights) -> Tensor:
            total = features[0].new_zeros(())
            for lam, y, target, here in zip(predicted(features, at), mixed, targets, some, strict=True):
                square = torch.where(here, lam - y, 0.0).square().mean()
                if config.fit == "kl":
                    apart = torch.where(here, target - lam, 0.0)
                    square = square / 10 + (apart.exp() * apart).mean()
                total = total + square
            return total

        for _ in range(config.inner_steps):
            counts["inner"] += 1
            gradient = self.network.gradient(loss, state["weights"])
            state["weights"], state["first"], state["second"] = adam(
                state["weights"], gradient, state["first"], state["second"], counts["inner"], config.inner_lr
            )
        counts["steps"] += 1
        if counts["steps"] % 2 == 0:
            state["average"] = torch.lerp(state["weights"], state["average"], config.average)


def shapes(width: int) -> Shapes:
    """Of the weights of both networks."""
    one: dict[str, tuple[int, ...]] = {}
    for side in SIDES:
        for layer in ("1", "2"):
            one |= {f"{side}.{layer}.weight": (width, width), f"{side}.{layer}.bias": (width,)}
            one |= {f"{side}.{layer}.scale": (width,), f"{side}.{layer}.shift": (width,)}
        one |= {f"{side}.out.weight": (width,), f"{side}.out.bias": (1,)}
    return one


def initial(width: int, seed: int) -> Weights:
    """First weights: uniform in +-1 / sqrt(D), as of torch's linear layers; norms are the identity."""
    generator = torch.Generator().manual_seed(seed)
    found: Weights = {}
    for name, shape in shapes(width).items():
        drawn = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(width)
        kind = name.rpartition(".")[2]
        found[name] = torch.ones(shape) if kind == "scale" else torch.zeros(shape) if kind == "shift" else drawn
    return found


def predicted(features: list[Tensor], weights: Weights) -> list[Tensor]:
    """Lam of images and of texts, (b,) each."""
    found: list[Tensor] = []
    for side, f in zip(SIDES, features, strict=True):
        h = f
        for layer in ("1", "2"):
            of = {kind: weights[f"{side}.{layer}.{kind}"].to(f) for kind in ("weight", "bias", "scale", "shift")}
            h = F.layer_norm(F.linear(h, of["weight"], of["bias"]).relu(), f.shape[1:], of["scale"], of["shift"])
        found.append((h + f).relu() @ weights[f"{side}.out.weight"].to(f) + weights[f"{side}.out.bias"].to(f))
    return found
