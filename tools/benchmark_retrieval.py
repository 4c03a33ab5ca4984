"""Time and memory of retrieval beside a full sort of the similarity matrix, one thread, CPU time.

python tools/benchmark_retrieval.py --images 3000 --texts 15000            both ways, and their ratio
python tools/benchmark_retrieval.py --images 30000 --texts 150000 --alone  where the matrix itself would not fit
"""

import argparse
import resource
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.evaluation.retrieval import retrieval


def features(images: int, texts: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors, each text near its image: (N, D), (M, D), and the image of each text (M,)."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(images, width, generator=generator), dim=-1)
    owners = torch.arange(texts) % images
    text = torch.empty(texts, width)
    for rows in torch.split(torch.arange(texts), 10_000):
        noise = torch.randn(len(rows), width, generator=generator) * width**-0.5
        text[rows] = F.normalize(0.2 * image[owners[rows]] + noise, dim=-1)
    return image, text, owners


def by_sorting(image: Tensor, text: Tensor) -> None:
    """What an evaluation does that argsorts the whole matrix both ways."""
    scores = image @ text.T
    scores.argsort(1, descending=True)
    scores.T.argsort(1, descending=True)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--texts", type=int, default=15000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="do not sort")
    options = parser.parse_args()
    torch.set_num_threads(1)
    image, text, owners = features(options.images, options.texts, options.width)
    print(f"{options.images} images, {options.texts} texts, width {options.width}; before: {peak_gib():.2f} GiB")
    times: dict[str, list[float]] = {"retrieval": [], "sort": []}
    for _ in range(options.repeats):
        begin = time.process_time()
        ranks = retrieval(image, text, image_of_text=owners)
        times["retrieval"].append(time.process_time() - begin)
        if not times["sort"]:
            print(f"peak with retrieval: {peak_gib():.2f} GiB")
        if not options.alone:
            begin = time.process_time()
            by_sorting(image, text)
            times["sort"].append(time.process_time() - begin)
    middle = {name: sorted(found)[len(found) // 2] for name, found in times.items() if found}
    print(", ".join(f"{name} {seconds:.2f} CPU-s" for name, seconds in middle.items()))
    if "sort" in middle:
        print(f"{middle['sort'] / middle['retrieval']:.1f} times faster than sorting")
    print({name: round(one.value, 4) for name, one in ranks.numbers().items() if "R@1" in name})


if __name__ == "__main__":
    main()
