"""Group the samples of a data set into communities of the same size, whose samples a frozen model finds similar.

    amclr-scale embed MODEL --shards /data/cc3m --side image --out image.npy
    amclr-scale embed MODEL --shards /data/cc3m --side text --out text.npy
    amclr-scale shards communities /data/cc3m --image image.npy --text text.npy --out communities.npy
    amclr-scale train ... data.batches=similar data.communities=communities.npy

For every sample the texts are ranked by their similarity to its image. The first --skip of them, among which are its
own and those that say the same, are passed over; it points to the --neighbours that follow. Communities of --size
samples are then grown along what points either way (B3, arXiv:2505.11293, which takes METIS). NAME.npy holds a number
for every sample, and NAME.npy.json says of which samples; any other file of numbers serves data.communities as well.
Where a batch is a multiple of --size, it consists of whole communities.

Takes 2 N^2 R operations, for N samples and features of R numbers, and 48 bytes per sample and neighbour.
"""

import json
from pathlib import Path

import numpy as np

from amclr_scale.commands.embed import unfinished
from amclr_scale.commands.words import check_place, command_parser, run_command
from amclr_scale.config import schema
from amclr_scale.data.beside.partition import communities_of, graph_of, inside
from amclr_scale.data.indexing import open_index
from amclr_scale.errors import UserError


def work(argv: list[str]) -> None:
    """What `main` does, without the words for mistakes."""
    parser = command_parser("shards communities", __doc__)
    parser.add_argument("shards", nargs="+", help="the data set, named as in data.train")
    parser.add_argument("--image", nargs="+", required=True, help="features of its images, as data.image_reference")
    parser.add_argument("--text", nargs="+", required=True, help="features of its texts, or the images' once more")
    parser.add_argument("--out", type=Path, required=True, help="NAME.npy to write")
    parser.add_argument("--size", type=int, default=32, help="K, samples of a community")
    parser.add_argument("--skip", type=int, default=30, help="p, nearest texts to pass over: false negatives")
    parser.add_argument("--neighbours", type=int, default=100, help="m, texts behind them that a sample points to")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which communities begin")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".npy":
        raise UserError(f"--out: expected a name that ends in .npy, got {arguments.out}")
    check_place("--out", arguments.out)  # before the work
    index = open_index(schema.Data(train=arguments.shards), key="shards", captioned=False)
    N = index.num_samples
    for name, least, most in (("size", 2, N), ("skip", 0, N - 2), ("neighbours", 1, N - 1 - max(0, arguments.skip))):
        got = getattr(arguments, name)
        if not least <= got <= most:
            raise UserError(f"--{name}: expected {least} to {most:,} in a data set of {N:,} samples, got {got}")
    import torch
    import torch.nn.functional as F

    from amclr_scale.data.beside.references import FINGERPRINT, References
    from amclr_scale.similarity import top_k

    images, texts = (
        F.normalize(References(f"--{name}", getattr(arguments, name), index)(range(N)), dim=1)
        for name in ("image", "text")
    )
    if images.shape != texts.shape:
        raise UserError(f"--text: expected features of {images.shape[1]} numbers, as of images, got {texts.shape[1]}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, ranked = top_k(images.to(device), texts.to(device), arguments.skip + arguments.neighbours)
    graph = graph_of(ranked[:, arguments.skip :].cpu().numpy())
    found = communities_of(graph, arguments.size, arguments.seed)

    with unfinished(arguments.out) as new, new.open("wb") as file:
        np.save(file, found)
    about = {name: getattr(arguments, name) for name in ("size", "skip", "neighbours", "seed")}
    about |= {FINGERPRINT: index.fingerprint}
    arguments.out.with_name(f"{arguments.out.name}.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    by_chance = (arguments.size - 1) / (N - 1)  # of the other samples, those in the same one
    print(
        f"{arguments.out}: {found.max() + 1:,} communities of {arguments.size} of {N:,} samples; "
        f"{inside(graph, found):.1%} of edges are inside one, {by_chance:.1%} by chance"
    )


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 a mistake, told in words, 1 a full or closed disk."""
    return run_command(work, argv)
