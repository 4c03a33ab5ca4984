"""Now and then during training: what do batches of B get wrong, measured on a fixed set of K training samples?

The samples are the first K that another seed's order would give, augmented once: the same for every objective, batch
size, number of ranks and moment of a run. They are encoded in evaluation mode with the present weights;
objectives/whole_set.py says what is then compared. How far the embeddings have moved since the measurement before is
their drift, mean |f_t(x) - f_(t-dt)(x)|^2: what makes stored averages, queues and banks stale. How long ago each was
visited follows from the order of training. Nothing that trains is changed: weights, per-sample state and random numbers
are afterwards what they were.

Costs K forward passes, host memory for K / W samples as the loader gives them and for K embeddings, and on every rank K
embeddings and gradients of every view.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.config.schema import Config
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.order import BatchOrder
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.encoders.rank_buffers import one_set_of_buffers
from amclr_scale.engine.last_layer import LastLayer
from amclr_scale.engine.micro_batches import on_device, split
from amclr_scale.engine.random_state import RandomState
from amclr_scale.engine.teacher import Teacher
from amclr_scale.errors import UserError
from amclr_scale.objectives.base import Objective, numbers
from amclr_scale.objectives.whole_set import compare_with_whole_set
from amclr_scale.similarity import all_gather, rank
from amclr_scale.types import Batch, Embeddings, flatten, is_shared

ANOTHER_SEED = 1_000_003  # added to the run's: the probe is not what training begins with


def read_probe(config: Config, rank_info: RankInfo) -> Batch | None:
    """This rank's share of the probe's samples, or None where there is no probe; no process group yet.

    Raises:
        UserError: the data set has fewer samples.
    """
    K = config.run.probe.samples
    if not K:
        return None
    data = config.data  # the device does not hold so many pictures, and the host's are the same
    data = data.model_copy(
        update={"augment_on": "workers", "resident": "host" if data.resident == "device" else data.resident}
    )
    loader = TrainLoader(
        data, seed=config.seed + ANOTHER_SEED, global_batch_size=K,
        rank=rank_info.rank, world_size=rank_info.world_size, workers=config.execution.workers, begun=True,
    )  # fmt: skip
    if loader.num_samples < K:
        raise UserError(f"run.probe.samples: expected at most the {loader.num_samples} samples of the data, got {K}")
    batch = next(loader)
    loader.close()
    return batch


class Probe:
    """`probe(engine, objective)`: numbers that say how far batches of B are from the whole set.

    Args:
        batch: this rank's share of the samples, from `read_probe`.
        micro_batch_sizes: images and texts encoded at once.
        order: of training's samples, from which follows when each was visited; None: ages are not known.
        teacher: of the run, who lends the objective what it asks for.
    """

    def __init__(
        self, config: Config, batch: Batch, *, micro_batch_sizes: tuple[int, int], device: torch.device,
        order: BatchOrder | None = None, teacher: Teacher | None = None,
    ):  # fmt: skip
        self.config, self.batch, self.order, self.teacher = config, batch, order, teacher
        self.micro_batch_sizes, self.device = micro_batch_sizes, device
        self._before: dict[str, Tensor] = {}  # (K, D) on the host, by modality: embeddings of the last measurement

    def __call__(self, engine: Any, objective: Objective) -> dict[str, float]:
        """Measure; see `compare_with_whole_set`. All ranks call it, between two steps.

        From the second measurement on also `drift_image` and `drift_text`, from 0 to 4 for unit rows.
        """
        training, b = engine.training, len(self.batch)
        views = {"image": len(self.batch.images), "text": len(self.batch.texts)}
        data = self.config.data
        layer = LastLayer(views, {"image": data.image_negatives, "text": data.text_negatives})
        engine.eval()
        try:
            with RandomState(self.device), one_set_of_buffers(engine.module):
                lends = self.teacher if self.teacher and self.teacher.lends else None
                lent = lends.lend(self.batch, self.micro_batch_sizes) if lends else {}
                with layer.noted(engine.module):  # of the student alone
                    embeddings = self._encode(engine, lent)
        finally:
            engine.train(training)
        mine = slice(rank() * b, (rank() + 1) * b)
        layer.forget_others(embeddings.flat(), mine)
        found = compare_with_whole_set(
            objective,
            self._whole(objective),
            embeddings,
            global_batch_size=self.config.train.global_batch_size,
            seed=self.config.seed,
            ages=self._ages(embeddings, objective.epoch),
            layer=lambda gradient: layer(gradient, mine),
        )
        return found | self._drift(embeddings)

    def state_dict(self) -> dict[str, Tensor]:
        """What the next measurement needs of the last one, the same on every rank; goes into a checkpoint."""
        return dict(self._before)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue; the state of a probe of another size is left aside, as it says nothing about these samples."""
        K = self.config.run.probe.samples
        self._before = state if all(len(x) == K for x in state.values()) else {}

    def _ages(self, embeddings: Embeddings, epoch: float) -> Tensor | None:
        """(K,) steps since each sample's last visit, negative where there was none.

        Args:
            epoch: at the beginning of the last step.
        """
        if self.order is None:
            return None
        assert embeddings.ids is not None
        B = self.config.train.global_batch_size
        done = round(epoch * self.order.samples_per_epoch / B) + 1
        last = self.order.last_visits(embeddings.ids.cpu().numpy(), done, B)
        return torch.from_numpy(np.where(last < 0, -1, done - last)).to(embeddings.ids.device)

    def _drift(self, embeddings: Embeddings) -> dict[str, float]:
        now = {"image": embeddings.image.float().cpu(), "text": embeddings.text.float().cpu()}
        before, self._before = self._before, now
        return dict(numbers(**{f"drift_{side}": (now[side] - x).square().sum(1).mean() for side, x in before.items()}))

    def _whole(self, objective: Objective) -> Objective:
        """One that has seen nothing yet, for a data set of K samples."""
        changes = {**objective.whole_set_options, "num_samples": self.config.run.probe.samples}
        if objective.queue is not None:
            changes["queue"] = None
        section = objectives.without_sizes(self.config.objective)
        return objectives.from_section(section, "replicated", **changes).to(self.device)

    @torch.no_grad()
    def _encode(self, engine: Any, lent: Mapping[str, Tensor]) -> Embeddings:
        """All K embeddings, on every rank, with what a teacher lends of this rank's."""
        parts: dict[str, list[Tensor]] = {}
        for micro_batch in on_device(split(self.batch, *self.micro_batch_sizes), self.device):
            for name, output in flatten(engine(micro_batch.images, micro_batch.texts)).items():
                parts.setdefault(name, []).append(output)
        rows = {name: found[0] if is_shared(name) else all_gather(torch.cat(found)) for name, found in parts.items()}
        beside = {name: all_gather(found.to(self.device)) for name, found in self.batch.beside().items()}
        beside |= {name: all_gather(found) for name, found in lent.items()}
        return Embeddings.from_flat({**rows, **beside})
