"""What each objective costs beside CLIP: forward and backward of the loss alone, on fixed random embeddings.

    python tools/benchmark_objectives.py --batch 4096 --width 512 --rounds 5

Runs are interleaved: each round times every objective once, in turn, and the table holds medians over rounds and
ratios of medians inside this run. Times are CPU seconds of this process, so other processes on the machine disturb
ratios little. "pairings" is the number of B x B similarity matrices an objective needs. The first round, in which
memory is touched for the first time, is not counted.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.objectives.base import Objective
from amclr_scale.types import Embeddings

PATCHES, WORDS = 4, 4  # tokens of an image and of a text, for `filip`: so many pairings are their product

# label, name, options, pairings
CASES: list[tuple[str, str, dict[str, Any], int]] = [
    ("clip", "clip", {}, 1),
    ("clip, label_smoothing", "clip", {"label_smoothing": 0.1}, 1),
    ("siglip", "siglip", {}, 1),
    ("dcl", "dcl", {}, 1),
    ("dclw", "dclw", {}, 1),
    ("sogclr", "sogclr", {}, 1),
    ("scent", "scent", {}, 1),
    ("isogclr", "isogclr", {}, 1),
    ("isogclr_net", "isogclr_net", {}, 1),
    ("fastclip v0", "fastclip", {"version": "v0"}, 1),
    ("fastclip v1", "fastclip", {"version": "v1"}, 1),
    ("fastclip v2", "fastclip", {"version": "v2"}, 1),
    ("fastclip v3", "fastclip", {"version": "v3"}, 1),
    ("onlineclr", "onlineclr", {}, 1),
    ("cyclip", "cyclip", {}, 1),
    ("uniformity", "uniformity", {}, 4),
    ("amclr", "amclr", {}, 4),
    ("amclr_dro", "amclr_dro", {}, 4),
    ("xamclr", "xamclr", {}, 6),
    ("xamclr_dro", "xamclr_dro", {}, 6),
    ("vicreg", "vicreg", {}, 0),
    ("fifo_bank", "fifo_bank", {"size": 4096, "init": "randn"}, 3),
    ("momentum_queue", "momentum_queue", {"size": 4096, "init": "randn"}, 8),
    ("full_bank", "full_bank", {"negatives": 4096, "num_texts": None}, 2),
    ("momentum_queue, alpha=0", "momentum_queue", {"size": 4096, "init": "randn", "alpha": 0.0}, 4),
    ("clip, mask_duplicates", "clip", {"mask_duplicates": "both"}, 1),
    ("clip, false_negative_margin", "clip", {"false_negative_margin": 0.1}, 1),
    ("sogclr, mask_duplicates", "sogclr", {"mask_duplicates": "both"}, 1),
    ("simclr", "simclr", {}, 3),
    ("slip", "slip", {}, 4),
    ("supcon", "supcon", {}, 1),
    ("supcon, in", "supcon", {"log": "in"}, 2),
    ("decoupled", "decoupled", {}, 1),
    ("one_to_k", "one_to_k", {}, 2),
    ("siglip_plus", "siglip_plus", {}, 1),
    ("debiased", "debiased", {}, 1),
    ("gram", "gram", {}, 1),
    ("gram, third: image", "gram", {"third": "image"}, 2),
    ("m2_mixup", "m2_mixup", {}, 3),
    ("cacr", "cacr", {}, 1),
    ("swav", "swav", {}, 1),
    ("siamlip", "siamlip", {}, 1),
    ("barlip", "barlip", {}, 1),
    ("negclip", "negclip", {}, 2),
    ("byolip", "byolip", {}, 1),
    ("count", "count", {}, 1),
    ("degla, negatives=1", "degla", {"negatives": 1}, 2),
    ("distill", "distill", {}, 2),
    ("mochi", "mochi", {}, 1),
    ("meow", "meow", {}, 2),
    ("pamc", "pamc", {}, 0),
    ("m3col", "m3col", {}, 2),
    ("m3col, soft targets", "m3col", {"soft_epoch": 0.0}, 2),
    ("cwcl", "cwcl", {}, 1),
    ("rankclip", "rankclip", {}, 5),
    ("vrns", "vrns", {}, 1),
    ("filip", "filip", {}, PATCHES * WORDS),
    ("drrho", "drrho", {}, 2),
    ("neuclip", "neuclip", {}, 1),
    ("neuclip, 1,024 prototypes, 2 steps", "neuclip", {"prototypes": 1024, "inner_steps": 2}, 1),
    ("neuclip, 256 prototypes, 2 steps", "neuclip", {"prototypes": 256, "inner_steps": 2}, 1),
    ("amorlip", "amorlip", {}, 1),
    ("amorlip, 1 step", "amorlip", {"inner_steps": 1}, 1),
    ("sogclr, squared_hinge", "sogclr", {"surrogate": "squared_hinge"}, 1),
]


def embeddings(batch: int, width: int, num_samples: int, reference_width: int) -> Embeddings:
    """Random unit rows, with everything that any objective reads."""
    generator = torch.Generator().manual_seed(0)

    def rows(width: int = width) -> Tensor:
        return F.normalize(torch.randn(batch, width, generator=generator), dim=1).requires_grad_()

    def leaf(value: float, size: int = 1) -> Tensor:
        return torch.full((size,), value).requires_grad_()

    tokens: dict[str, Any] = {}
    for side, n in (("image", PATCHES), ("text", WORDS)):
        found = torch.randn(batch, n, width, generator=generator)
        tokens[f"{side}_tokens"] = F.normalize(found, dim=2).requires_grad_()
        tokens[f"{side}_token_mask"] = torch.ones(batch, n, dtype=torch.bool)
    return Embeddings(
        image=rows(),
        text=rows(),
        ids=torch.randint(num_samples, (batch,), generator=generator),
        logit_scale=leaf(1 / 0.07),
        logit_bias=leaf(-10.0),
        image_views=(rows(), rows()),
        text_views=(rows(), rows()),
        text_content=torch.randint(num_samples, (batch,), generator=generator),
        image_reference=rows(reference_width).detach(),
        text_reference=rows(reference_width).detach(),
        text_negatives=(rows(),),
        text_negative_mask=torch.ones(batch, 1, dtype=torch.bool),
        image_predicted=rows(),
        text_predicted=rows(),
        image_projected=rows(),
        text_projected=rows(),
        shared={"prototypes": torch.randn(3000, width, generator=generator).requires_grad_()},
        labels=torch.randint(batch // 4, (batch,), generator=generator),
        image_temperature=leaf(0.03, batch),
        text_temperature=leaf(0.03, batch),
        **tokens,
        image_momentum=rows().detach(),
        text_momentum=rows().detach(),
    )


def seconds(objective: Objective, batch: Embeddings) -> float:
    """CPU seconds of one forward and backward."""
    start = time.process_time()
    objective(batch).value.backward()
    elapsed = time.process_time() - start
    for x in batch.flat().values():
        x.grad = None
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096, help="B, samples")
    parser.add_argument("--width", type=int, default=512, help="D, embedding width")
    parser.add_argument("--reference-width", type=int, help="R, of a frozen model's features; by default D")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the medians over them are reported")
    parser.add_argument("--num-samples", type=int, default=3_000_000, help="N, rows of per-sample state")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--only", nargs="*", help="labels to time beside clip, such as sogclr amclr")
    parser.add_argument("--json", type=Path, help="also write every time to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    batch = embeddings(
        arguments.batch, arguments.width, arguments.num_samples, arguments.reference_width or arguments.width
    )
    cases = [case for case in CASES if not arguments.only or case[0] in ("clip", *arguments.only)]
    modules = {
        label: objectives.create(name, num_samples=arguments.num_samples, **options)
        for label, name, options, _ in cases
    }
    times: dict[str, list[float]] = {label: [] for label in modules}
    for number in range(1 + arguments.rounds):
        for label, objective in modules.items():
            elapsed = seconds(objective, batch)
            if number:
                times[label].append(elapsed)
        print(f"round {number} of {arguments.rounds}", file=sys.stderr)

    medians = {label: statistics.median(values) for label, values in times.items()}
    print(f"B = {arguments.batch:,}, D = {arguments.width}, N = {arguments.num_samples:,}, torch {torch.__version__}")
    print("| objective | pairings | CPU seconds | / clip | / clip / pairings |\n|---|---|---|---|---|")
    for label, _, _, pairings in cases:
        ratio = medians[label] / medians["clip"]
        each = f"{ratio / pairings:.2f}" if pairings else "-"
        print(f"| {label} | {pairings} | {medians[label]:.3f} | {ratio:.2f} | {each} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"settings": vars(arguments), "seconds": times}, default=str, indent=1))


if __name__ == "__main__":
    main()
