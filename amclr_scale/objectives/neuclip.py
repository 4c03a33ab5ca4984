"""NeuCLIP: the normaliser of each anchor from a small network over features, trained in steps of its own.

"NeuCLIP: Efficient Large-Scale CLIP Training with Neural Normalizer Optimization", 2025, arXiv:2511.08417.

With g_i as in SogCLR, log g_i is the minimum over a number alpha_i of exp(-alpha_i) (eps + g_i) + alpha_i - 1. Here
alpha_i is a function of the embedding, of m unit prototypes W_p in the space of the other modality:

    alpha_i   = log( eps + (1/m) sum_p exp((z_i.W_p - s_ii) / t) )              W' for texts as anchors
    objective   mean_i t ( exp(-alpha_i) (eps + g_i) + alpha_i - 1 )  (+ the texts')
    inner       `inner_steps` steps of AdaGrad on W, W' with z, s_ii, g and t held
    value       mean_i t exp(-alpha_i) g_i  (+ the texts')                      alpha after the inner steps, held

g stands in the objective as it is, so its expectation over batches is right: no average, no age, nothing per sample.
Every `restart_steps` steps W is filled with text embeddings of training, W' with those of images, from the batches that
come then, as many of them as m takes. Before that has happened once, alpha is over the prototypes that there are.

The paper's summaries and abstract are what this follows; its code was not to be had. Whether alpha has a gradient in
the towers' step they do not say: at the inner optimum it makes no difference, and here it has none.

Numerics: centred log-sums throughout; float32.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.objectives.base import Objective, at_least_float32, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.estimator import centred, ratio
from amclr_scale.objectives.inner import Inner, Weights, adagrad
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import all_gather
from amclr_scale.types import Embeddings, Loss

SIDES = ("image", "text")
TILE = 2**20  # similarities at a time, on a CPU


class NeuCLIP(Objective, name="neuclip"):
    """Global contrastive loss whose normalisers come from prototypes that are trained in inner steps."""

    whole_set_options: ClassVar[Mapping[str, Any]] = {"estimate": "batch"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `neuclip`."""

        temperature: float | None = 0.07  # fixed, shared by all samples; null: learned, 1 / logit_scale
        prototypes: int = 4096  # m, of each modality
        inner_steps: int = 10  # of the prototypes, in each step of training
        inner_lr: float = 0.01  # AdaGrad's
        restart_steps: int = 500  # steps of training from one filling of the prototypes to the next
        eps: float = 1e-14  # added to g
        rho: float = 0.0  # radius of the robust loss that a learned temperature minimises, as FastCLIP v3's
        estimate: Literal["network", "batch"] = "network"  # batch: alpha = log(eps + g), the control

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            for key in ("prototypes", "inner_steps", "restart_steps"):
                require(getattr(self, key) > 0, key, "at least 1", getattr(self, key))
            for key in ("inner_lr", "eps"):
                require(getattr(self, key) > 0, key, "a positive number", getattr(self, key))
            require(self.rho >= 0, "rho", "a divergence of at least 0", self.rho)
            unused = self.temperature is None or self.rho == 0
            require(unused, "rho", "0 for a fixed temperature, which it says nothing about", self.rho)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        m = config.prototypes
        self.network = Inner(
            lambda width: dict.fromkeys(SIDES, (m, width)), ("weights", "squares"), ("steps", "position", "filled")
        )

    def allocate(self, width: int) -> None:
        super().allocate(width)
        if self.config.estimate == "network":
            self.network.make(width)

    def rehearse(self, width: int, slots: int) -> None:
        super().rehearse(width, slots)
        if self.config.estimate == "network":
            m = self.config.prototypes
            self.network.make(width)
            self.network.weights.normal_()
            self.network.counts |= {"steps": 1, "position": m, "filled": m}

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        t = learned_temperature(embeddings, config.temperature)
        held = t.detach().squeeze() if isinstance(t, Tensor) else t
        sides = centred(embeddings.image, embeddings.text, t, self.masks(embeddings))
        log_eps = math.log(config.eps)
        log_gs = [torch.logaddexp(side.log_g.detach(), side.log_g.new_tensor(log_eps)) for side in sides]
        some = [~side.log_g.isneginf() for side in sides]  # anchors with a key; others count 0
        alphas = self._alphas(embeddings, held, log_gs, some)

        terms = [ratio(side.log_g, alpha) for side, alpha in zip(sides, alphas, strict=True)]
        duals: list[Tensor] = []
        apart: list[Tensor] = []
        for log_g, alpha, here in zip(log_gs, alphas, some, strict=True):
            duals.append(torch.where(here, alpha + (log_g - alpha).exp() - 1, 0.0))
            apart.append(torch.where(here, (alpha - log_g).abs(), 0.0))
        dual = (duals[0] + duals[1]).mean()
        value = held * (terms[0] + terms[1]).mean()
        if config.temperature is None:
            value = value + (t * (2 * config.rho + dual)).sum()
        return Loss(
            value,
            numbers(
                objective=held * (2 * config.rho + dual),
                temperature=held,
                alpha_against_batch=(apart[0] + apart[1]).mean() / 2,
            ),
        )

    @property
    def predicts(self) -> bool:
        """Whether estimates come from the network."""
        return self.config.estimate != "batch"

    @torch.no_grad()
    def log_means(self, embeddings: Embeddings, trained_with: int) -> tuple[Tensor, Tensor]:
        """Its estimates (b,) of log(eps + g), of images and of texts, of any batch; `trained_with` makes no difference.

        With `estimate: batch` they are what the batch says; -inf before the first step.
        """
        t = learned_temperature(embeddings, self.config.temperature)
        t = t.squeeze() if isinstance(t, Tensor) else t
        image, text = (at_least_float32(x.detach()) for x in (embeddings.image, embeddings.text))
        filled = self.network.counts["filled"]
        if not self.predicts:
            log_eps = math.log(self.config.eps)
            both = centred(image, text, t, self.masks(embeddings))
            of_image, of_text = (torch.logaddexp(x.log_g, x.log_g.new_tensor(log_eps)) for x in both)
            return of_image, of_text
        if not filled:
            return image.new_full((len(image),), -math.inf), text.new_full((len(text),), -math.inf)
        at, own = self.network.shaped(self.network.weights), (image * text).sum(1)
        sides = (("image", image), ("text", text))
        of_image, of_text = (_alpha(rows, own, t, at[side][:filled], self.config.eps) for side, rows in sides)
        return of_image, of_text

    def _alphas(
        self, embeddings: Embeddings, t: Tensor | float, log_gs: list[Tensor], some: list[Tensor]
    ) -> list[Tensor]:
        """(b,) of images and of texts, after the inner steps."""
        config, network = self.config, self.network
        if config.estimate == "batch":
            return log_gs
        image, text = (at_least_float32(x.detach()) for x in (embeddings.image, embeddings.text))
        own = (image * text).sum(1)

        def alphas(weights: Weights, filled: int) -> list[Tensor]:
            sides = (("image", image), ("text", text))
            return [_alpha(rows, own, t, weights[side][:filled], config.eps) for side, rows in sides]

        learns = self.learns
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            if not learns:
                counted = network.counts["filled"]
                return alphas(network.shaped(network.weights), counted) if counted else log_gs
            if not network.width:
                network.make(image.shape[1], image.device)
            network.ready(image)
            counts = dict(network.counts)
            weights, squares = self._filled(counts, image, text)

            filled = counts["filled"]
            known = [log_g.where(here, math.nan) for log_g, here in zip(log_gs, some, strict=True)]
            for _ in range(config.inner_steps):
                gradient = torch.zeros_like(weights)
                at, into = network.shaped(weights), network.shaped(gradient)
                for side, rows, log_g in zip(SIDES, (image, text), known, strict=True):
                    _add_gradient(into[side][:filled], rows, own, t, at[side][:filled], config.eps, log_g)
                weights, squares = adagrad(weights, network.averaged(gradient), squares, config.inner_lr)
            counts["steps"] += 1
            network.keep(counts, weights=weights, squares=squares)
            return alphas(network.shaped(weights), counts["filled"])

    def _filled(self, counts: dict[str, int], image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and their sums of squares before the inner steps, with new rows where it is time for some."""
        network, m = self.network, self.config.prototypes
        if counts["steps"] % self.config.restart_steps == 0:
            counts["position"] = 0
        first = counts["position"]
        if first >= m:
            return network.weights.clone(), network.squares.clone()
        weights, squares = (network.shaped(x.clone()) for x in (network.weights, network.squares))
        for side, keys in (("image", text), ("text", image)):
            rows = all_gather(keys)[: m - first]
            weights[side][first : first + len(rows)] = rows
            squares[side][first : first + len(rows)] = 0.0
        counts["position"] = first + len(rows)
        counts["filled"] = max(counts["filled"], counts["position"])
        return network.flat(weights), network.flat(squares)


def _tiles(
    anchors: Tensor, own: Tensor, t: Tensor | float, prototypes: Tensor, eps: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Of some anchors at a time, so few that a tile stays in cache: which, exp(x - max) (c, m), its sums, the logarithm
    of the mean of exp(x), and alpha, (c,) each. `prototypes` (m, D) have unit rows.
    """
    m = len(prototypes)
    step = max(1, (TILE if anchors.device.type == "cpu" else 64 * TILE) // m)
    for start in range(0, len(anchors), step):
        rows = slice(start, start + step)
        x = (anchors[rows] @ prototypes.T).sub_(own[rows, None]).div_(t)
        shift = x.amax(1)
        mass = x.sub_(shift[:, None]).exp_().sum(1)
        mean = shift + mass.log() - math.log(m)
        yield rows, x, mass, mean, torch.logaddexp(mean, mean.new_tensor(math.log(eps)))


def _alpha(anchors: Tensor, own: Tensor, t: Tensor | float, weights: Tensor, eps: float) -> Tensor:
    """(b,): alpha of each anchor, of prototypes (m, D) of any length."""
    prototypes = F.normalize(weights.to(anchors), dim=1)
    return torch.cat([alpha for *_, alpha in _tiles(anchors, own, t, prototypes, eps)])


def _add_gradient(
    into: Tensor, anchors: Tensor, own: Tensor, t: Tensor | float, weights: Tensor, eps: float, log_g: Tensor
) -> None:
    """Add to `into` the gradient of the inner objective's mean over these anchors with respect to prototypes (m, D).

    With A_i = exp(x_ip) / sum exp(x_i.), the gradient of t (exp(log g - alpha) + alpha) with respect to z_i.W_p is
    (1 - exp(log g - alpha_i)) exp(mean_i - alpha_i) A_ip: one product makes x, one the gradient, as each tile is met.

    Args:
        log_g: (b,), nan of anchors that have no key.
    """
    length = weights.to(anchors).norm(dim=1, keepdim=True).clamp(min=1e-12)
    prototypes = weights.to(anchors) / length
    d_prototypes = torch.zeros_like(prototypes)
    for rows, x, mass, mean, alpha in _tiles(anchors, own, t, prototypes, eps):
        share = (1 - (log_g[rows] - alpha).exp()) * (mean - alpha).exp() / (mass * len(anchors))
        d_prototypes.addmm_(x.mul_(share.nan_to_num(0.0)[:, None]).T, anchors[rows])
    into += (d_prototypes - (d_prototypes * prototypes).sum(1, keepdim=True) * prototypes) / length
