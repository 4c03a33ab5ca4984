"""Numbers that say what an objective is doing: cheap, without gradient, for the trainer to log now and then.

    geometry             alignment mean |z_i - t_i|^2, uniformity log mean exp(-2 |x_j - x_k|^2) per modality, the gap
                         between the modalities' centres, mean similarity of positives
    npc_multiplier       mean of 1 - P_ii, the factor that softmax losses put on a pair's gradient and DCL takes away
    estimator_error      how far a moving average u is from the mean over the whole data set that it estimates
    temperature_spread   temperatures of the samples visited so far
    gradient_norms       norm of the gradient that reaches each modality's embeddings
    of_step              what of these a single step can answer

Every function returns floats about the global batch, the same on every rank, and has to be called by all ranks.
"""

import math

import torch
from torch import Tensor

from amclr_scale.errors import UserError
from amclr_scale.objectives.base import Objective, at_least_float32, numbers
from amclr_scale.objectives.sample_state import SampleState
from amclr_scale.objectives.uniformity import log_mean_potential
from amclr_scale.similarity import all_gather, all_sum, column_mean, contrast, world_size
from amclr_scale.types import Embeddings

KEYS_AT_ONCE = 8192


@torch.no_grad()
def geometry(image: Tensor, text: Tensor) -> dict[str, float]:
    """Where the embeddings lie, from this rank's unit rows, (b, D) each."""
    image, text = at_least_float32(image), at_least_float32(text)
    positive = column_mean((image * text).sum(1, keepdim=True)).squeeze()
    return numbers(
        alignment=2 - 2 * positive,
        uniformity_image=log_mean_potential(image, image),
        uniformity_text=log_mean_potential(text, text),
        modality_gap=(column_mean(image) - column_mean(text)).norm(),
        positive_similarity=positive,
    )


@torch.no_grad()
def npc_multiplier(image: Tensor, text: Tensor, temperature: Tensor | float) -> dict[str, float]:
    """Mean over pairs and directions of 1 - P_ii, P the softmax over the global batch at this temperature."""
    both = contrast(image, text, temperature=temperature)
    of_image = -(both.image.positive / temperature - both.image.log_sum).expm1()  # (b,)
    of_text = -(both.text.positive / temperature - both.text.log_sum).expm1()
    return numbers(npc_multiplier=column_mean(((of_image + of_text) / 2)[:, None]).squeeze())


@torch.no_grad()
def gradient_norms(**gradients: Tensor | None) -> dict[str, float]:
    """Norm of each modality's gradient over the global batch.

    Args:
        gradients: such as image=embeddings.image.grad: (b, D), what this rank's backward left, or None.
    """
    norms = {
        f"gradient_norm_{name}": all_sum(gradient.float().square().sum()).sqrt() / world_size()
        for name, gradient in gradients.items()
        if gradient is not None
    }
    return numbers(**norms)


@torch.no_grad()
def temperature_spread(objective: Objective) -> dict[str, float]:
    """Mean, standard deviation, smallest and largest temperature of the samples visited so far, per modality.

    Empty for an objective without temperatures of its own, or before the first visit.
    """
    spread: dict[str, float] = {}
    for side in ("image", "text"):
        state = getattr(objective, f"{side}_state", None)
        if not isinstance(state, SampleState) or "temperature" not in state.columns:
            continue
        t = state.held("temperature")[state.held("log_u").isfinite()].double()  # this rank's
        sums = torch.stack([t.new_tensor(float(t.numel())), t.sum(), t.square().sum()])
        ends = torch.stack([-t, t]).amax(1) if t.numel() else t.new_full((2,), -torch.inf)
        if state.shards[0] > 1:
            sums, ends = all_sum(sums), all_gather(ends[None]).amax(0)
        count, total, squares = sums.tolist()
        if count:
            mean = total / count
            spread |= {
                f"temperature_{side}_mean": mean,
                f"temperature_{side}_std": math.sqrt(max(squares / count - mean**2, 0.0)),
                f"temperature_{side}_min": -ends[0].item(),
                f"temperature_{side}_max": ends[1].item(),
            }
    return spread


def of_step(objective: Objective, embeddings: Embeddings) -> dict[str, float]:
    """All of the above that one step's embeddings, after backward, can answer: what the trainer logs now and then."""
    image, text = embeddings.image.detach(), embeddings.text.detach()
    found = gradient_norms(image=embeddings.image.grad, text=embeddings.text.grad) | temperature_spread(objective)
    if objective.needs_unit_rows:
        found |= geometry(image, text)
        if embeddings.logit_scale is not None:
            found |= npc_multiplier(image, text, 1 / at_least_float32(embeddings.logit_scale.detach()))
    return found


@torch.no_grad()
def estimator_error(
    objective: Objective, image: Tensor, text: Tensor, probe: Tensor, temperature: float | None = None
) -> dict[str, float]:
    """Compare u of some samples with the mean over the whole data set, at the present embeddings.

    Args:
        objective: one with a single u per sample: sogclr, isogclr, fastclip, amclr with a shared state.
        image: (N, D), the unit embedding of every sample, in the order of ids; the same on every rank.
        text: (N, D), likewise.
        probe: (P,) ids to look at; those never visited are left out.
        temperature: where it is neither an option nor state of the objective (fastclip v0 and v3).

    Returns:
        Mean |u - g| / g and mean log(u / g) over probes and modalities, with g over all N - 1 negatives, and the
        number of probes that had been visited.

    Raises:
        UserError: (a ValueError) the objective has no such state, or its temperature is unknown.
    """
    ratios: list[Tensor] = []
    for side, anchors, keys in (("image", image, text), ("text", text, image)):
        state = getattr(objective, f"{side}_state", None)
        log_u = state.column("log_u") if isinstance(state, SampleState) else None
        if state is None or log_u is None or log_u[:1].numel() != 1:
            raise UserError("objective: expected one with a single u per sample, such as sogclr; got another")
        log_u = log_u.flatten().to(probe.device)
        if "temperature" in state.columns:
            t = state.column("temperature").flatten().to(probe.device)[probe]
        else:
            fixed = temperature or getattr(getattr(objective, "config", None), "temperature", None)
            if fixed is None:
                raise UserError(f"temperature: {objective.name} has no fixed one, got None; pass the present one")
            t = torch.full((len(probe),), fixed, device=probe.device)
        visited = log_u[probe].isfinite()
        log_g = full_log_mean(anchors, keys, probe[visited], t[visited])
        ratios.append(log_u[probe][visited].to(log_g) - log_g)
    log_ratio = torch.cat(ratios)
    if not log_ratio.numel():
        return {"estimator_probes": 0.0}
    return numbers(
        estimator_error=log_ratio.expm1().abs().mean(),
        estimator_log_ratio=log_ratio.mean(),
        estimator_probes=float(log_ratio.numel()) / 2,
    )


@torch.no_grad()
def full_log_mean(anchors: Tensor, keys: Tensor, probe: Tensor, temperature: Tensor) -> Tensor:
    """Log g over the whole data set, of the mean over j != i of exp((s_ij - s_ii) / t_i), (P,) for i in probe."""
    rows, own = at_least_float32(anchors)[probe], at_least_float32(keys)[probe]  # (P, D)
    positive = (rows * own).sum(1, keepdim=True)  # (P, 1)
    log_sum = torch.full_like(positive[:, 0], -torch.inf)
    for start in range(0, len(keys), KEYS_AT_ONCE):
        block = at_least_float32(keys[start : start + KEYS_AT_ONCE])
        with torch.autocast(rows.device.type, enabled=False):
            x = (rows @ block.T - positive) / temperature[:, None].to(rows)
        mine = probe[:, None] == torch.arange(start, start + len(block), device=probe.device)
        log_sum = torch.logaddexp(log_sum, x.masked_fill(mine, -torch.inf).logsumexp(1))
    return log_sum - math.log(len(keys) - 1)
