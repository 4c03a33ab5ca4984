"""Published and customary memory figures of large-batch contrastive learning, computed again.

Each example has what was claimed, the arithmetic with this package's formulas, and a verdict: the claim agrees, or is
corrected. Sources are named by kind; figures that people repeat from one another are called customary.
"""

from dataclasses import dataclass

from amclr_scale.memory.units import GIB, MIB
from tools.memory_pages.formulas import (
    gathered_features,
    model_states,
    momentum_copy,
    queue,
    sample_state,
    similarity_matrix,
)

P = 90_600_000  # ResNet-50 without classifier, DistilBERT, two heads to 256
CC3M_MIX = 3_264_868  # pairs of the thesis that kept a feature of each
DENSE = 4  # B x B tensors of a loss that keeps them: logits of both directions, and what autograd makes of them


@dataclass(frozen=True)
class Example:
    """One figure.

    Attributes:
        what: in words, with the arithmetic.
        source: who says so.
        claimed: as it was said.
        value: the same quantity in bytes, as claimed; None where the claim is another kind of number.
        computed: in bytes.
        tolerance: by how much a rounded claim may differ.
    """

    what: str
    source: str
    claimed: str
    value: float
    computed: float
    tolerance: float = 0.005

    @property
    def agrees(self) -> bool:
        return abs(self.value - self.computed) <= self.tolerance * self.computed


def _states() -> list[Example]:
    claims = {(1, 0): 1449, (8, 1): 498, (8, 2): 340, (8, 3): 181, (64, 1): 379, (64, 2): 201, (64, 3): 23}
    return [
        Example(
            f"Parameters, gradients and Adam of P = 90.6 M in mixed precision, W = {ranks}, ZeRO {stage}",
            "our own design", f"{megabytes:,} MB", megabytes * 1e6, model_states(P, ranks, stage), 0.02,
        )
        for (ranks, stage), megabytes in claims.items()
    ]  # fmt: skip


def _similarities() -> list[Example]:
    B = 32_768
    dense = [
        ("CLIP's loss, all B x B on every rank", 32_768, 32_768, 16.67),
        ("CLIP's loss, all B x B on every rank", 65_536, 65_536, 66.11),
        ("open_clip's local loss on 8 ranks, b x B", 8_192, 65_536, 8.63),
        ("open_clip's local loss on 8 ranks, b x B", 16_384, 131_072, 33.64),
    ]
    return [
        Example("One B x B of similarities, B = 32,768, float32", "customary", "4.0 GiB", 4 * GIB,
                similarity_matrix(B, B)),
        Example("xAmCLR at omega = 1: six of them", "our own design", "24 GiB", 24 * GIB,
                similarity_matrix(B, B, matrices=6)),
        Example("Blocks of 1,024 rows of it", "our own design", "128 MiB", 128 * MIB, similarity_matrix(1024, B)),
        Example("Gathered features of both modalities, B = 32,768, D = 256, float32", "our own design", "64 MiB",
                64 * MIB, gathered_features(B, 256)),
        *(Example(f"{what}, {rows:,} x {columns:,}: {DENSE} float32 tensors", "Inf-CL, arXiv:2410.17243, table 1",
                  f"{gigabytes} GB", gigabytes * 1e9, similarity_matrix(rows, columns, matrices=DENSE), 0.05)
          for what, rows, columns, gigabytes in dense),
    ]  # fmt: skip


def _banks() -> list[Example]:
    thesis = "thesis notes on memory banks"
    four = queue(65_536, 3072, banks=2) + queue(65_536, 768, banks=2)
    return [
        Example("A queue of 65,536 features of width 3,072, float32", thesis, "805.8 MB", 805.8e6, queue(65_536, 3072),
                0.0001),
        Example("A queue of 65,536 features of width 768", thesis, "201.3 MB", 201.3e6, queue(65_536, 768)),
        Example("Four queues: two layers, two modalities", thesis, "2.013 GB", 2.013e9, four),
        Example("Two of the narrower layer only", thesis, "0.403 GB", 0.403e9, queue(65_536, 768, banks=2)),
        Example("A bank of all 3,264,868 samples, width 768: one of the four", thesis, "10.03 GB", 10.03e9,
                queue(CC3M_MIX, 768)),
        Example("All four banks", thesis, "100.3 GB", 100.3e9, queue(CC3M_MIX, 3072, banks=2)
                + queue(CC3M_MIX, 768, banks=2)),
        Example("A bank of width 128", thesis, "1.67 GB", 1.67e9, queue(CC3M_MIX, 128)),
        Example("Free memory of a 24 GB card of which 98 % is used", thesis, "1.2 GB", 1.2e9, 0.02 * 24e9),
        Example("Momentum copy of P = 90.6 M, float32", "our own design", "362 MB", 362e6, momentum_copy(P)),
    ]  # fmt: skip


def _tables() -> list[Example]:
    claims = ((100_000, "1.6 MB", 1.6e6), (2_900_000, "46.4 MB", 46.4e6), (400_000_000, "6.4 GB", 6.4e9))
    return [
        Example(f"SogCLR's tables, N = {samples:,}", "our own design", claimed, value, sample_state(samples, 4))
        for samples, claimed, value in claims
    ]


def examples() -> dict[str, list[Example]]:
    """Heading -> examples."""
    return {
        "State of the model": _states(),
        "Similarities and features": _similarities(),
        "Queues, banks and copies": _banks(),
        "Numbers per sample": _tables(),
    }


def page() -> str:
    """docs/memory_worked_examples.md."""
    lines = [
        "# Worked examples",
        "",
        "Memory figures that are published, or customary (people repeat them from one another), or that this",
        "project's own design documents gave. Each is computed again here with `tools/memory_pages/formulas.py`:",
        "",
        "    python tools/memory_table.py --worked-examples docs/memory_worked_examples.md",
        "",
        "P is the number of parameters, W of ranks, B of pairs in the global batch, N of samples in the data set; D is",
        "the width of the embeddings. 1 MB = 10^6 bytes, 1 GiB = 2^30 bytes. A claim agrees when it is within 0.5 % of",
        "the computed figure. Other limits: 2 % for the state of the model, 5 % for the figures of Inf-CL's table,",
        "which are measured peaks, and 0.01 % for the first queue, whose claim has four digits.",
    ]
    for heading, found in examples().items():
        lines += ["", f"## {heading}", "", "| what | claimed by | claimed | computed, bytes | that is | |"]
        lines.append("|---|---|---|---|---|---|")
        for example in found:
            verdict = "agrees" if example.agrees else "**corrected**"
            in_claims_unit = _like(example.claimed, example.computed)
            lines.append(
                f"| {example.what} | {example.source} | {example.claimed} | {round(example.computed):,} "
                f"| {in_claims_unit} | {verdict} |"
            )
    wrong = [example for found in examples().values() for example in found if not example.agrees]
    lines += ["", f"{len(wrong)} claims are corrected:", ""]
    lines += [f"* {e.what}: {_like(e.claimed, e.computed)}, not {e.claimed}." for e in wrong]
    return "\n".join(lines) + "\n"


def _like(claimed: str, size: float) -> str:
    """Bytes in the unit of a claim, four digits."""
    unit = claimed.rsplit(maxsplit=1)[-1]
    scale = {"MB": 1e6, "GB": 1e9, "MiB": MIB, "GiB": GIB}[unit]
    return f"{size / scale:,.4g} {unit}"
