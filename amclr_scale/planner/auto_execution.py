"""What a configuration leaves to the machine, settled at the start: `execution: auto` and `kept_micro_batches: auto`.

    auto_keys = AutoExecution(config, rank_info, num_samples)       # before the process group
    config, words = auto_keys.resolve_auto(device)                # inside it: all ranks get the same answer

Two steps, because objectives are traced in a process group that pretends (objective_trace.py, objective_memory.py),
while ranks can only agree on the least free memory among them inside the real one.
"""

from collections.abc import Collection

import psutil
import torch

from amclr_scale.config.schema import Config
from amclr_scale.distributed.collectives import gather_numbers, group
from amclr_scale.distributed.launcher import RankInfo, export
from amclr_scale.distributed.process_group import broadcast_object, device_type
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.memory.account import account
from amclr_scale.memory.units import in_two_digits, in_words
from amclr_scale.metrics.devices import DeviceProfile, find_profile, measure_cpu, profile_of
from amclr_scale.planner.search import Fit
from amclr_scale.planner.settings import KEYS, changed, largest_number, settings_of
from amclr_scale.planner.traffic import objective_trace

MARGIN = 0.9  # share of the free memory that is planned with: the rest is for what no account sees
# For GPUs without a data sheet on file: settings come in much the same order on all of them.
STAND_IN = "A100 80GB"


def free_memory(device: torch.device, ranks_here: int) -> int:
    """Bytes that this rank may still take: of its GPU, or its share of what the host has available.

    Args:
        ranks_here: on this host, which share its memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // ranks_here


def given(config: Config) -> set[str]:
    """The keys among those that `auto` decides which a file or a word gave: they stay."""
    execution = config.execution
    keys = execution.model_fields_set | {f"similarity.{key}" for key in execution.similarity.model_fields_set}
    if execution.kept_micro_batches == "auto":
        keys.discard("kept_micro_batches")
    return keys & set(KEYS)


class AutoExecution:
    """What is open in a configuration.

    Args:
        config: of the run.
        rank_info: this rank among the others.
        num_samples: N, the size of the data set.
    """

    def __init__(self, config: Config, rank_info: RankInfo, num_samples: int):
        self.config, self.rank_info, self.num_samples = config, rank_info, num_samples
        if config.execution.auto or config.execution.kept_micro_batches == "auto":
            self._trace()

    def _trace(self) -> None:
        """Ask what will be asked later, and is remembered, while there is no process group."""
        export(self.rank_info)  # whether all ranks share a node decides how objectives share their work
        kind = device_type()
        for gather in ("all", "ring") if self.config.execution.auto else (self.config.execution.similarity.gather,):
            wanted = changed(self._base(), **{"similarity.gather": gather})
            account(wanted, world_size=self.rank_info.world_size, num_samples=self.num_samples, device=kind)
            objective_trace(wanted, self.rank_info.world_size, self.num_samples, kind, self.rank_info.local_world_size)

    def _base(self) -> Config:
        kept = self.config.execution.kept_micro_batches
        return changed(self.config, auto=False, kept_micro_batches=1 if kept == "auto" else kept)

    def resolve_auto(self, device: torch.device) -> tuple[Config, list[str]]:
        """The configuration with a number for everything, and what was chosen, in words. Every rank calls it.

        Raises:
            UserError: nothing fits; says which component is the largest and what shrinks it.
        """
        execution = self.config.execution
        if not execution.auto and execution.kept_micro_batches != "auto":
            return self.config, []
        free = min(
            number for (number,) in gather_numbers([free_memory(device, self.rank_info.local_world_size)], group())
        )
        usable = round(MARGIN * free)
        words = [f"{in_words(free)} free on the fullest device; planned with {in_words(usable)} per rank"]
        if not execution.auto:
            return self._settle_kept(device, usable, words)
        return self._settle_all(device, usable, words)

    def _profile(self, device: torch.device) -> DeviceProfile:
        if device.type == "cuda":
            return profile_of(device) or find_profile(STAND_IN)
        return measure_cpu(threads=torch.get_num_threads(), ranks=self.rank_info.local_world_size)

    def _settle_kept(self, device: torch.device, usable: int, words: list[str]) -> tuple[Config, list[str]]:
        world_size = self.rank_info.world_size
        micro_batches = make_plan(self.config, self.num_samples, world_size).micro_batches

        def peak(kept: int) -> int:
            wanted = changed(self.config, kept_micro_batches=kept)
            return account(wanted, world_size=world_size, num_samples=self.num_samples, device=device).peak_bytes

        kept = largest_number(lambda kept: peak(kept) <= usable, 0, micro_batches)
        words.append(
            f"execution.kept_micro_batches: auto -> {kept} of {micro_batches}, {in_words(peak(kept))} at the peak"
        )
        return changed(self.config, kept_micro_batches=kept), words

    def _settle_all(self, device: torch.device, usable: int, words: list[str]) -> tuple[Config, list[str]]:
        fixed: Collection[str] = given(self.config)
        fit = Fit(
            self._base(), self._profile(device), world_size=self.rank_info.world_size, num_samples=self.num_samples,
            memory=usable, ranks_per_node=self.rank_info.local_world_size, fixed=fixed,
        )  # fmt: skip
        # Rank 0 decides: measured rates differ a little between ranks, and all must do the same.
        found = fit.fastest(self.config.train.global_batch_size, top=1)[0]
        chosen = changed(self._base(), **broadcast_object(found.settings if self.rank_info.rank == 0 else None))
        largest = found.account.largest()
        words += [
            f"execution: auto -> {' '.join(f'{key}={value}' for key, value in settings_of(chosen).items())}",
            f"  {in_words(found.account.peak_bytes)} at the peak (phase {found.account.peak_phase}, most of it "
            f"{largest.name}), about {in_two_digits(found.cost.seconds)} s a step, "
            f"{in_two_digits(found.cost.samples_per_second)} samples/s"
            + (f"; given, so kept: {', '.join(sorted(fixed))}" if fixed else ""),
        ]
        return chosen, words
