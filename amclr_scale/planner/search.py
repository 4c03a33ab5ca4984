"""What fits: the largest global batch for so much memory, and the fastest execution settings for a given batch.

    fit = Fit(config, profile, world_size=8, num_samples=2_900_000, memory=80 * 2**30)
    fit.largest()                 # a global batch size
    fit.fastest(32768)            # a list of Choice, the fastest first

Nothing is run: memory comes from the account, time from the cost model. The search goes over ZeRO stage, offload,
recomputation, gathering or ring, micro-batch and kept micro-batches. For each of the first four, the largest
micro-batches that fit are tried with none and with as many kept graphs as fit: memory grows and time falls with both.
Precision, optimizer and everything in the recipe stay as they are, and so does every key that is held `fixed`.

Recomputation is looked at only where it can help. The gradient cache runs every forward twice at most, 4/3 of the plain
operations, which is what full recomputation costs too; so where micro-batches without it fit that are large enough for
the towers to take about that time, nothing is to be gained, and their traces are not made.
"""

import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from amclr_scale.config.checks import check
from amclr_scale.config.schema import Config
from amclr_scale.encoders.recomputation import Recomputation, blocks
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.errors import UserError
from amclr_scale.memory.account import Account, account, inputs_on_host
from amclr_scale.memory.towers import skeleton
from amclr_scale.memory.units import in_words
from amclr_scale.metrics.devices import DeviceProfile
from amclr_scale.planner.settings import KEYS, changed, largest_number, settings_of, with_batch
from amclr_scale.planner.step_time import Cost, Rates, estimate
from amclr_scale.planner.traffic import kept_of

SMALL_CHUNK = {"cuda": 1024, "cpu": 256}  # where memory is short; larger tiles are a little faster
WORTH_IT = 1.1  # recomputation is looked at where towers take so much longer than their operations
MICRO_BATCHES_TRIED = 3  # the largest that fits, and its halves
CEILING = 2**40  # of a batch size: beyond every data set


@dataclass(frozen=True)
class Choice:
    """Execution settings that fit, with what they need."""

    config: Config
    account: Account
    cost: Cost

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.config)

    def words(self) -> str:
        """`execution.zero_stage=1 execution.micro_batch_size=64 ...`, for a command line."""
        return " ".join(f"execution.{key}={value}" for key, value in self.settings.items())


@dataclass
class Fit:
    """A search.

    Args:
        config: whose recipe, precision and fixed keys are kept.
        profile: of the device.
        world_size: W.
        num_samples: N, the size of the data set.
        memory: bytes that tensors of one rank may take on its device.
        host_memory: bytes beside a GPU that one rank may take in the host's memory; None: not limited.
        ranks_per_node: None: all on one.
        rates: None: the cost model's guesses.
        fixed: keys of `execution` that stay, such as zero_stage or similarity.gather.

    Raises:
        UserError: a fixed key is none that the search decides.
    """

    config: Config
    profile: DeviceProfile
    world_size: int
    num_samples: int
    memory: int
    host_memory: int | None = None
    ranks_per_node: int | None = None
    rates: Rates | None = None
    fixed: Collection[str] = field(default=())

    def __post_init__(self) -> None:
        for key in self.fixed:
            if key not in KEYS:
                raise UserError(f"fixed: expected keys among {', '.join(KEYS)}, got {key}")

    def account(self, config: Config) -> Account:
        return account(config, world_size=self.world_size, num_samples=self.num_samples, device=self.profile)

    def fits(self, found: Account) -> bool:
        """Within both limits."""
        host = self.host_memory is None or found.host_bytes <= self.host_memory
        return host and found.peak_bytes <= self.memory

    def choice(self, config: Config) -> Choice:
        """Settings with what they need, whether they fit or not."""
        cost = estimate(
            config, self.profile, world_size=self.world_size, num_samples=self.num_samples,
            ranks_per_node=self.ranks_per_node, rates=self.rates,
        )  # fmt: skip
        return Choice(config, self.account(config), cost)

    def _values(self, key: str, values: list[Any]) -> list[Any]:
        return [settings_of(self.config)[key]] if key in self.fixed else values

    @cached_property
    def _frames(self) -> list[dict[str, Any]]:
        """Every combination of stage, offload, recomputation and gathering that the checks allow."""
        model = skeleton(self.config)
        depths = [len(blocks(model.image_tower)), len(blocks(model.text_tower))]
        both: list[tuple[Recomputation, Recomputation]] = [
            ("none", "none"),
            ("full", "none"),
            ("none", "full"),
            ("full", "full"),
        ]
        both += [(2, 2)] if min(depths) >= 2 else []
        useful = {
            (image if depths[0] else "none", text if depths[1] else "none")
            for image, text in both
            if image in self._values("recompute_image", [image]) and text in self._values("recompute_text", [text])
        } or {(self.config.execution.recompute_image, self.config.execution.recompute_text)}
        frames = []
        for (stage, offload), (image, text), gather in itertools.product(
            self._stages(), sorted(useful, key=str), self._values("similarity.gather", self._gathers())
        ):
            frame = {
                "zero_stage": stage, "offload": offload, "recompute_image": image, "recompute_text": text,
                "similarity.gather": gather,
            }  # fmt: skip
            if not check(changed(self.config, **frame, micro_batch_size=None), self.world_size):
                frames.append(frame)
        return frames

    def _gathers(self) -> list[str]:
        return ["all", "ring"] if self.world_size > 1 else ["all"]

    def _stages(self) -> list[tuple[int, str]]:
        """Stages with offload; those that save nothing here are left out unless they are fixed."""
        execution, fixed = self.config.execution, set(self.fixed)
        first = 1 if execution.halves_weights else 0

        def useful(stage: int, offload: str) -> bool:
            if self.profile.type == "cpu" and offload != "none" and "offload" not in fixed:
                return False  # on a CPU, device and host are one
            return self.world_size > 1 or offload != "none" or stage == first or "zero_stage" in fixed

        return [
            (stage, offload)
            for stage, offload in itertools.product(
                self._values("zero_stage", [0, 1, 2, 3]), self._values("offload", ["none", "optimizer", "parameters"])
            )
            if useful(stage, offload)
        ]

    def _chunks(self) -> list[Any]:
        return self._values("similarity.chunk", ["auto", SMALL_CHUNK[self.profile.type]])

    def _micro_batches(self, local_batch: int) -> list[int]:
        """Powers of two and the whole share, the largest first."""
        if "micro_batch_size" in self.fixed:
            return [min(self.config.execution.micro_batch_size or local_batch, local_batch)]
        if self.config.model.image.norm == "sync":
            return [local_batch]
        powers = [2**k for k in range(local_batch.bit_length()) if 2**k < local_batch]
        return [local_batch, *reversed(powers)]

    def _kept(self, config: Config, most: bool = False) -> int:
        """Micro-batches to keep: none (all, where there is one only), or as many as fit."""
        if "kept_micro_batches" in self.fixed:
            return kept_of(config)
        n = make_plan(config, self.num_samples, self.world_size).micro_batches
        if not most:
            return 1 if n == 1 else 0
        return largest_number(
            lambda kept: self.fits(self.account(changed(config, kept_micro_batches=kept))), 1 if n == 1 else 0, n
        )

    def _candidates(self, batch: int, frames: list[dict[str, Any]], chunk: Any) -> Iterator[Choice]:
        config = with_batch(self.config, batch)
        for frame in frames:
            tried = 0
            for micro in self._micro_batches(batch // self.world_size):
                plain = changed(config, **frame, **{"similarity.chunk": chunk}, micro_batch_size=micro)
                plain = changed(plain, kept_micro_batches=self._kept(plain))
                if not self.fits(self.account(plain)):
                    continue
                for kept in {kept_of(plain), self._kept(plain, most=True)}:
                    yield self.choice(changed(plain, kept_micro_batches=kept))
                tried += 1
                if tried == MICRO_BATCHES_TRIED:
                    break

    def fastest(self, batch: int, top: int = 5) -> list[Choice]:
        """Settings for this global batch, the fastest first; of equally fast ones (three digits), those that need less.

        Raises:
            UserError: nothing fits; says which component is the largest and what shrinks it.
        """
        self._check_batch(batch)
        found: list[Choice] = []
        for frames in self._by_recomputation():
            for chunk in self._chunks():
                found += self._candidates(batch, frames, chunk)
            found.sort(key=_order)
            if found and found[0].cost.towers <= WORTH_IT * found[0].cost.bound:
                break
        if found:
            return found[:top]
        raise UserError(self._nothing_fits(batch))

    def _by_recomputation(self) -> list[list[dict[str, Any]]]:
        """Frames without recomputation, and those with it."""
        without = [f for f in self._frames if f["recompute_image"] == f["recompute_text"] == "none"]
        return [frames for frames in (without, [f for f in self._frames if f not in without]) if frames]

    def _frugal(self, batch: int, frames: list[dict[str, Any]]) -> Iterator[Account]:
        """The settings that need least: one sample at a time, nothing kept, small blocks, all there is to recompute."""
        config, chunk = with_batch(self.config, batch), self._chunks()[-1]
        least = {"full": 0, 2: 1, "none": 2}
        recomputed = {(f["recompute_image"], f["recompute_text"]) for f in frames}
        best = min(recomputed, key=lambda pair: least.get(pair[0], 1) + least.get(pair[1], 1), default=None)
        for frame in frames:
            if (frame["recompute_image"], frame["recompute_text"]) == best:
                micro = self._micro_batches(batch // self.world_size)[-1]
                plain = changed(config, **frame, **{"similarity.chunk": chunk}, micro_batch_size=micro)
                yield self.account(changed(plain, kept_micro_batches=self._kept(plain)))

    def _batch_fits_host(self, batch: int) -> bool:
        """Whether the samples themselves do, whatever the settings: asked first, for it needs no trace."""
        config = with_batch(self.config, batch)
        waiting = inputs_on_host(
            config, world_size=self.world_size, num_samples=self.num_samples, device=self.profile
        )  # fmt: skip
        return self.host_memory is None or waiting <= self.host_memory

    def _some_fit(self, batch: int) -> bool:
        """Whether any settings fit. Recomputation is only asked where it could make the difference."""
        if not self._batch_fits_host(batch):
            return False
        for frames in self._by_recomputation():
            hopeless = True
            for found in self._frugal(batch, frames):
                if self.fits(found):
                    return True
                hopeless &= _without_activations(found) > self.memory
            if hopeless:
                return False
        return False

    def largest(self) -> int:
        """The largest global batch that some settings fit; a multiple of data.lanes.

        Raises:
            UserError: not even the smallest fits.
        """
        step = self.config.data.lanes
        low = self._least_batch() // step
        self._check_batch(low * step)
        if not self._some_fit(low * step):
            raise UserError(self._nothing_fits(low * step))
        while low * step < CEILING and self._some_fit(2 * low * step):
            low *= 2
        return largest_number(lambda steps: self._some_fit(steps * step), low, 2 * low - 1) * step

    def _check_batch(self, batch: int) -> None:
        mistakes = check(with_batch(self.config, batch), self.world_size)
        mistakes = [line for line in mistakes if not line.startswith(("execution.", "train.samples"))]
        if mistakes:
            raise UserError("\n".join(mistakes))

    def _nothing_fits(self, batch: int) -> str:
        accounts = (found for frames in self._by_recomputation() for found in self._frugal(batch, frames))
        found = min(accounts, key=lambda a: a.peak_bytes, default=None)
        if found is None:
            return f"fixed: no ZeRO stage and offload go with {', '.join(self.fixed)}; fix fewer keys"
        if found.peak_bytes <= self.memory:
            return (
                f"host_memory: a global batch of {batch} needs {in_words(found.host_bytes)} of the host's memory per "
                f"rank, got {in_words(self.host_memory or 0)}; use a smaller train.global_batch_size or more ranks"
            )
        top, least = found.largest(), self._least_batch()
        # What the search decides, it has tried; the other keys are the user's to turn.
        first = re.match(r"execution\.([\w.]+)", top.knob)
        tried = first is not None and first[1] in set(KEYS) - set(self.fixed)
        ways = [
            *([] if tried else [top.knob]),
            "use more ranks",
            "a smaller train.global_batch_size" if batch > least else "a smaller model: no global batch is smaller",
        ]
        return (
            f"memory: a global batch of {batch} on {self.world_size} ranks needs {in_words(found.peak_bytes)} per rank "
            f"at the least, got {in_words(self.memory)}; largest: {top.name}, "
            f"{in_words(top.by_phase.get(found.peak_phase, 0))} in phase {found.peak_phase}; {', or '.join(ways)}"
        )

    def _least_batch(self) -> int:
        """The smallest global batch: a multiple of data.lanes, and of two samples at least."""
        step = self.config.data.lanes
        return max(step, -(-2 // step) * step)


def _order(choice: Choice) -> tuple[float, bool, int]:
    """The fastest first, to three digits; then large tiles, which the cost model does not tell from small ones."""
    return float(f"{choice.cost.seconds:.3g}"), choice.settings["similarity.chunk"] != "auto", choice.account.peak_bytes


def _without_activations(found: Account) -> int:
    """The peak, if activations took nothing."""
    activations = [c for c in found.components if c.kind == "activations"]
    return max(size - sum(c.by_phase.get(phase, 0) for c in activations) for phase, size in found.by_phase.items())
