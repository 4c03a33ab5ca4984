"""Numbers that say what an objective is doing: cheap, without gradient, for the trainer to log now and then.

    geometry             alignment mean |z_i - t_i|^2, uniformity log mean exp(-2 |x_j - x_k|^2) per modality, the gap
                         between the modalities' centres, mean similarity of positives
    npc_multiplier       mean of 1 - P_ii, the factor that softmax losses put on a pair's gradient and DCL takes away
    temperature_spread   temperatures of the samples visited so far
    gradient_norms       norm of the gradient that reaches each modality's embeddings
    collisions           samples that a batch holds twice, and negatives that are positives as ids and captions tell
    teacher_cosine       how near the features of a teacher are to the student's
    of_step              what of these a single step can answer

Every function returns floats about the global batch, the same on every rank, and has to be called by all ranks.
"""

import math
from itertools import combinations

import torch
from torch import Tensor

from amclr_scale.objectives.base import Objective, at_least_float32, numbers
from amclr_scale.objectives.sample_state import SampleState
from amclr_scale.objectives.uniformity import log_mean_potential
from amclr_scale.similarity import all_gather, all_sum, column_mean, contrast, world_size
from amclr_scale.types import Embeddings


@torch.no_grad()
def geometry(image: Tensor, text: Tensor) -> dict[str, float]:
    """Where the embeddings lie, from this rank's unit rows, (b, D) each."""
    image, text = at_least_float32(image), at_least_float32(text)
    positive = column_mean((image * text).sum(1, keepdim=True)).squeeze()
    return dict(
        numbers(
            alignment=2 - 2 * positive,
            uniformity_image=log_mean_potential(image, image),
            uniformity_text=log_mean_potential(text, text),
            modality_gap=(column_mean(image) - column_mean(text)).norm(),
            positive_similarity=positive,
        )
    )


@torch.no_grad()
def npc_multiplier(image: Tensor, text: Tensor, temperature: Tensor | float) -> dict[str, float]:
    """Mean over pairs and directions of 1 - P_ii, P the softmax over the global batch at this temperature."""
    both = contrast(image, text, temperature=temperature, centred=True)
    of_image, of_text = -(-both.image.log_sum).expm1(), -(-both.text.log_sum).expm1()  # (b,) each
    return dict(numbers(npc_multiplier=column_mean(((of_image + of_text) / 2)[:, None]).squeeze()))


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
    return dict(numbers(**norms))


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


@torch.no_grad()
def collisions(ids: Tensor, captions: Tensor, text_ids: Tensor | None = None) -> dict[str, float]:
    """How often the global batch contradicts itself.

    `duplicates` is the share of its samples that it holds more than once; `false_negatives` the share of its ordered
    pairs i != j, which softmax losses treat as negatives, with the same sample, the same text or the same caption word
    for word. A lower bound: two captions may say the same in other words. Both are 0 for a single sample.

    Args:
        ids: (b,) int64, this rank's samples.
        captions: (b, L) int64, token ids of the captions.
        text_ids: (b,) int64, where an image has several captions.
    """
    keys = [all_gather(ids), all_gather(captions).unique(dim=0, return_inverse=True)[1]]  # (B,) each
    if text_ids is not None:
        keys.append(all_gather(text_ids))

    def groups(*of: Tensor) -> Tensor:
        """Sizes of the groups of samples that agree in all of these."""
        sizes: Tensor = torch.stack(of, 1).unique(dim=0, return_counts=True)[1]
        return sizes.double()

    # pairs that agree in one key at least: those of every key, less those of every two keys, plus ...
    same, sign = torch.zeros((), dtype=torch.float64, device=ids.device), 1
    for size in range(1, len(keys) + 1):
        for some in combinations(keys, size):
            count = groups(*some)
            same += sign * (count * (count - 1)).sum()
        sign = -sign
    B, count = len(keys[0]), groups(keys[0])
    return dict(numbers(duplicates=count[count > 1].sum() / B, false_negatives=same / max(1, B * (B - 1))))


@torch.no_grad()
def teacher_cosine(embeddings: Embeddings) -> dict[str, float]:
    """Mean cosine of each embedding with the teacher's of the same sample; {} where none is lent."""
    found = {}
    for side in ("image", "text"):
        lent = embeddings.given.get(f"{side}_momentum")
        if isinstance(lent, Tensor):
            rows = at_least_float32(getattr(embeddings, side).detach())
            cosines = torch.nn.functional.cosine_similarity(rows, at_least_float32(lent), dim=1)
            found[f"teacher_cosine_{side}"] = all_sum(cosines.mean()) / world_size()
    return dict(numbers(**found))


def of_step(objective: Objective, embeddings: Embeddings, captions: Tensor | None = None) -> dict[str, float]:
    """All of the above that one step's embeddings, after backward, can answer: what the trainer logs now and then.

    Args:
        captions: (b, L) token ids of the step's captions, on any device; None leaves `collisions` out.
    """
    image, text = embeddings.image.detach(), embeddings.text.detach()
    found = gradient_norms(image=embeddings.image.grad, text=embeddings.text.grad) | temperature_spread(objective)
    if objective.needs_unit_rows:
        found |= geometry(image, text)
        if embeddings.logit_scale is not None:
            found |= npc_multiplier(image, text, 1 / at_least_float32(embeddings.logit_scale.detach()))
    found |= teacher_cosine(embeddings)
    if captions is not None and embeddings.ids is not None:
        found |= collisions(embeddings.ids, captions.to(image.device), embeddings.text_ids)
    return found
