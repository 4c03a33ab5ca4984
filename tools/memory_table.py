"""What each technique buys: memory per rank, as tables and as a picture; and published figures computed again.

    python tools/memory_table.py --plot docs/memory.png
    python tools/memory_table.py --config C --gpus 64 --batch 65536 model.image.name=timm/vit_large_patch14_clip_224
    python tools/memory_table.py --worked-examples docs/memory_worked_examples.md

Without --config the model is ViT-B/16 with a 12-layer text tower in bf16. Nothing is run: memory is the account's.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from amclr_scale.config.load import load
from amclr_scale.config.schema import Config
from amclr_scale.errors import UserError

MODEL = [
    "model.image.name=timm/vit_base_patch16_224", "model.text.name=transformers/bert", "model.embedding_width=512",
    "data.image_size=224", "data.context_length=77", "data.tokenizer=clip", "execution.precision=bf16",
    "execution.zero_stage=1", "train.epochs=1",
]  # fmt: skip
CARDS = (24, 80, 141)  # GiB: RTX 4090, A100 and H100, H200
MOST_RANKS = 512
# Methods that add to another one, and that one.
ADDED = {"+ state per sample": "gradient cache", "+ queue": "gradient cache", "+ momentum encoder": "+ queue"}


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="memory_table.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file; without it, the model named above")
    parser.add_argument("--gpus", type=int, default=8, help="ranks of the first table")
    parser.add_argument("--batch", type=int, default=32_768, help="global batch of the other tables")
    parser.add_argument("--num-samples", type=int, default=2_900_000, help="N, for the state per sample")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--worked-examples", type=Path, help="only write that page")
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides")
    return parser.parse_intermixed_args(argv)


def table(head: str, columns: list[str], curves: dict[str, list[int]]) -> str:
    """A Markdown table in GiB."""
    lines = [f"| {head} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{size / 2**30:,.2f}' for size in sizes)} |" for name, sizes in curves.items()]
    return "\n".join(lines)


def plot(path: Path, title: str, panels: list[tuple[str, list[Any], dict[str, list[int]]]]) -> None:
    """Lines against the batch and against ranks (both logarithmic), bars by stage, and what further methods add."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError(f"--plot: needs matplotlib: pip install 'amclr_scale[report]' ({error})") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from amclr_scale.study.report.compact import palette_png

    figure, axes = plt.subplots(1, 4, figsize=(18, 5), width_ratios=(4, 4, 3, 2.4), layout="constrained")
    # Where lines lie on one another, thinner ones on top of thicker ones keep all of them in sight.
    styles = {"all B x B on every rank": 2.0, "local rows, b x B": 5.5, "blocks": 2.0, "gradient cache": 3.5}
    for axis, (label, xs, curves) in zip(axes[:2], panels[:2], strict=True):
        for name, width in styles.items():
            axis.plot(xs, [size / 2**30 for size in curves[name]], linewidth=width, label=name)
        sizes = [size / 2**30 for name in styles for size in curves[name]]
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(xs, [f"{x:,}" for x in xs], rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks([4**k for k in range(-3, 9)], [f"{4.0**k:,g}" for k in range(-3, 9)])
        axis.set_ylim(0.7 * min(sizes), 1.6 * max(sizes))
        axis.set_xlabel(label)
        axis.legend(fontsize=9, loc="upper left" if axis is axes[0] else "upper right")
    label, names, curves = panels[2]
    for index, (name, found) in enumerate(curves.items()):
        heights = [size / 2**30 for size in found]
        bars = axes[2].bar([i + 0.4 * index - 0.2 for i in range(len(names))], heights, 0.38, label=name)
        axes[2].bar_label(bars, fmt="%.1f", fontsize=9)
    axes[2].set_xticks(range(len(names)), names)
    axes[2].set_xlabel(label)
    axes[2].set_ylim(0, 1.3 * axes[2].get_ylim()[1])
    axes[2].legend(fontsize=9, loc="upper right")
    for axis in axes[:3]:
        low, high = axis.get_ylim()
        for card in CARDS:
            if low < card < high:
                axis.axhline(card, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
                axis.annotate(f"{card} GiB", (0.005, card), xycoords=("axes fraction", "data"), va="bottom", fontsize=9)
        axis.set_ylabel("GiB per rank")
        axis.grid(alpha=0.25)
    _, _, by_batch = panels[0]
    added = {name: (by_batch[name][-1] - by_batch[before][-1]) / 2**20 for name, before in ADDED.items()}
    bars = axes[3].bar(range(len(added)), list(added.values()), 0.6, color="tab:purple")
    axes[3].bar_label(bars, fmt="%.0f", fontsize=9)
    axes[3].set_xticks(range(len(added)), [name.removeprefix("+ ").replace(" ", "\n") for name in added])
    axes[3].set_xlabel("further methods, on top of the cache")
    axes[3].set_ylabel("MiB per rank")
    axes[3].grid(axis="y", alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    path.write_bytes(palette_png(path.read_bytes()))


def run(options: argparse.Namespace) -> None:
    """Print the tables, draw the picture."""
    if options.worked_examples:
        from tools.memory_pages.worked_examples import page

        options.worked_examples.write_text(page())
        return
    from tools.memory_pages.what_if import MICRO_BATCH, QUEUE, STAGES, against_batch, against_ranks, against_stage

    words = [*([] if options.config else MODEL), f"data.lanes={max(MOST_RANKS, options.gpus)}", *options.words]
    words.append(f"train.global_batch_size={options.batch}")
    config: Config = load(options.config, words, options.gpus)
    batches = [2**k for k in range(9, 18) if 2**k >= options.gpus]
    ranks = [2**k for k in range(MOST_RANKS.bit_length()) if 2**k * 2 <= options.batch]
    model = f"{config.model.image.name} and {config.model.text.name}, {config.execution.precision}"
    N = options.num_samples
    by_batch = against_batch(config, world_size=options.gpus, batches=batches, num_samples=N)
    by_ranks = against_ranks(config, batch=options.batch, ranks=ranks, num_samples=N)
    by_stage = against_stage(config, batch=options.batch, world_size=options.gpus, num_samples=N)
    print(f"GiB per rank, {model}; micro-batches of {MICRO_BATCH} with the gradient cache, N = {N:,}, M = {QUEUE:,}\n")
    print(table(f"global batch on {options.gpus} ranks", [f"{b:,}" for b in batches], by_batch), end="\n\n")
    print(table(f"ranks, global batch {options.batch:,}", [f"{w:,}" for w in ranks], by_ranks), end="\n\n")
    print(table(f"ZeRO stage, {options.gpus} ranks, gradient cache", list(STAGES), by_stage))
    if options.plot:
        panels: list[tuple[str, list[Any], dict[str, list[int]]]] = [
            (f"global batch size on {options.gpus} ranks", batches, by_batch),
            (f"ranks, for a global batch of {options.batch:,}", ranks, by_ranks),
            (f"ZeRO stage, batch {options.batch:,} on {options.gpus} ranks, gradient cache", list(STAGES), by_stage),
        ]
        plot(options.plot, f"Predicted memory of one rank: {model}", panels)


def main(argv: list[str]) -> int:
    """Print, or say what is wrong."""
    try:
        run(arguments(argv))
        return 0
    except UserError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
