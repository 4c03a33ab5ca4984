"""Measure the loader: samples per second, against the raw reading rate and against plain webdataset.

    python tools/benchmark_loader.py emoji/train --image-size 64 --workers 0 1 2
    python tools/benchmark_loader.py --photos 2000 --image-size 224 --workers 0 1 2

Three rates of the same shards:
    reading       every image and caption, by offset, nothing decoded; and front to back, as webdataset reads
    ours          TrainLoader: deterministic order, decoding, augmentation, tokens, batches
    webdataset    its own shard and sample shuffle (buffer of 1,000), then the same decoding, augmentation and tokens

Rounds of both loaders alternate, and medians are reported, so that a busy machine slows both. CPU seconds are those of
the process and its workers together; on a machine with other work they say more than the wall time. --photos makes JPEG
pictures (256 pixels on the shorter side, quality 90) out of coloured noise with the spectrum of photographs.

    python tools/benchmark_loader.py corpora/icons/train --image-size 32 --resident none host device

compares reading with data sets that are held decoded; run it twice, for the first run decodes them.

    python tools/benchmark_loader.py --photos 2000 --image-size 224 --randaugment 2 7 --augment-on workers device

compares workers that make views with workers that decode, and the device makes the views (here a GPU, if there is one).

    python tools/benchmark_loader.py --config studies/base/icons_frozen --workers 0 --words data.text_views=1

measures the loader of a recipe alone, with the recipe's own batch, after its first batch (which makes what is held).

    python tools/benchmark_loader.py --photos 500 --image-size 224 --samples 500 --parts

says where a sample's time goes, in one process: each part for all samples, one part after another. Decoding as it is
done (a JPEG at 1/2 to 1/8 of its size, where crops allow it) stands beside decoding at full size and torchvision.io.

    python tools/benchmark_loader.py --shuffle 331x10000 --lanes 8 --window 4 --batch 4096

measures the order alone, for a data set of 331 shards of 10,000 samples: how often two samples of one shard meet in a
batch, and how often two that met in one epoch meet again in the next, both relative to a uniform shuffle.
"""

import argparse
import io
import itertools
import json
import math
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amclr_scale.commands.words import run_command
from amclr_scale.config import schema
from amclr_scale.config.load import load
from amclr_scale.config.schema import Config
from amclr_scale.data.decoding import Field, Sample, decode
from amclr_scale.data.image_views import augmented_view, reduction_for, to_tensor
from amclr_scale.data.index import Index
from amclr_scale.data.indexing import IMAGE_EXTENSIONS, open_index
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.order import Order
from amclr_scale.data.randomness import Draws
from amclr_scale.data.tokenizers import Tokenizer, load_tokenizer
from tools.loader_parts import parts_of_a_sample


def make_photos(folder: Path, count: int, per_shard: int = 500) -> str:
    """Shards of pictures with a 1/f spectrum."""
    random = np.random.default_rng(0)
    height, width = 256, 342
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    for shard, start in enumerate(range(0, count, per_shard)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(start, min(count, start + per_shard)):
                noise = np.fft.fft2(random.standard_normal((3, height, width))) / frequency
                picture = np.fft.ifft2(noise).real
                picture = 128 + 60 * picture / picture.std((1, 2), keepdims=True)
                out = io.BytesIO()
                pixels = picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
                Image.fromarray(pixels).save(out, "JPEG", quality=90)
                text = f"a picture of noise number {i}".encode()
                for extension, data in (("jpg", out.getvalue()), ("txt", text)):
                    info = tarfile.TarInfo(f"{i:07d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder)


def cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(run: Callable[[], int]) -> tuple[float, float]:
    """(samples per second, samples per CPU second)."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    samples = run()
    return samples / (time.perf_counter() - wall), samples / (cpu_seconds() - cpu)


def read_by_offset(index: Index) -> int:
    wanted = frozenset({*IMAGE_EXTENSIONS, "txt"})
    for shard, entry in enumerate(index.shards):
        reader = index.reader(shard)
        for row in range(entry.num_samples):
            reader.read(row, wanted)
    return index.num_samples


def local_tars(index: Index) -> list[str]:
    return [str(index.storage.local_path(shard.url, shard.sha256)) for shard in index.shards]


def read_front_to_back(index: Index) -> int:
    import webdataset

    stages = [webdataset.SimpleShardList(local_tars(index)), webdataset.tarfile_to_samples()]
    return sum(1 for _ in webdataset.DataPipeline(*stages))


def ours(data: schema.Data, batch: int, steps: int, workers: int) -> int:
    loader = TrainLoader(data, seed=0, global_batch_size=batch, workers=workers)
    samples = sum(len(next(loader)) for _ in range(steps))
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    loader.close()
    return samples


class Decoder:
    """What our pipeline does to one sample, as a webdataset stage."""

    def __init__(self, data: schema.Data, tokenizer: Tokenizer):
        self.data, self.tokenizer, self.made = data, tokenizer, 0

    def __call__(self, members: dict[str, Any]) -> tuple[torch.Tensor, str]:
        sample = Sample(members, self.data.max_image_pixels, self.data.max_caption_characters)
        opened, recipe, size = sample.image(), self.data.augmentation, self.data.image_size
        picture = decode(opened, reduction_for(opened, size, [recipe]))
        self.made += 1
        view = to_tensor(augmented_view(picture, size, recipe, Draws(0, self.made)))
        return view, sample.captions(Field("txt"))[0]

    def batch(self, pairs: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([image for image, _ in pairs]), self.tokenizer([caption for _, caption in pairs])


def chunks(size: int) -> Callable[[Iterator[Any]], Iterator[list[Any]]]:
    def run(stream: Iterator[Any]) -> Iterator[list[Any]]:
        while found := list(itertools.islice(stream, size)):
            yield found

    return run


def plain_webdataset(index: Index, data: schema.Data, batch: int, steps: int, workers: int) -> int:
    import webdataset

    decoder = Decoder(data, load_tokenizer(data.tokenizer, data.context_length))
    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(local_tars(index)),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(1000),
        webdataset.map(decoder),
        chunks(batch),
        webdataset.map(decoder.batch),
    )
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers)
    batches = iter(loader)
    samples = sum(len(next(batches)[0]) for _ in range(steps))
    del batches
    return samples


def of_recipe(config: Config, samples: int, workers: int) -> tuple[float, float]:
    """(samples per second, samples per CPU second) of a recipe's batches; nan beside workers, who still live."""
    size = config.train.global_batch_size
    loader = TrainLoader(config.data, seed=config.seed, global_batch_size=size, workers=workers)
    next(loader)
    rates = timed(lambda: sum(len(next(loader)) for _ in range(-(-samples // size))))
    loader.close()
    return rates[0], math.nan if workers else rates[1]


def shuffle_quality(shards: int, per_shard: int, lanes: int, window: int, batch: int) -> tuple[float, float]:
    """(same-shard pairs, pairs that meet again), relative to a uniform shuffle; over two epochs."""
    n = shards * per_shard
    order = Order(np.arange(0, n + 1, per_shard), seed=0, lanes=lanes, window=window)
    steps = n // batch
    where = np.full((2, n), -1)  # (epoch, id) -> step
    same = 0
    for epoch in range(2):
        for step in range(steps):
            ids = order.batch(epoch * steps + step, batch).ids
            where[epoch, ids] = step
            counts = np.bincount(ids // per_shard)
            same += int((counts * (counts - 1)).sum())
    expected_same = 2 * steps * batch * (batch - 1) * (per_shard - 1) / (n - 1)
    both = (where >= 0).all(0)
    meetings = np.unique(where[0, both] * steps + where[1, both], return_counts=True)[1]
    again = int((meetings * (meetings - 1)).sum())
    expected_again = steps * batch * (batch - 1) * (batch - 1) / (n - 1)
    return same / expected_same, again / expected_again


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="shards, named as in data.train")
    parser.add_argument("--photos", type=int, help="make so many pictures and use them instead")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--samples", type=int, default=10_000, help="per round")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resident", nargs="+", default=["none"], help="data.resident of ours")
    places = ("workers", "device")
    parser.add_argument("--augment-on", nargs="+", choices=places, default=places[:1], help="data.augment_on of ours")
    parser.add_argument("--randaugment", type=int, nargs=2, help="data.augmentation.randaugment; none if left out")
    parser.add_argument("--parts", action="store_true", help="say where a sample's time goes instead")
    parser.add_argument("--config", metavar="RECIPE", help="measure the loader of such a recipe instead")
    parser.add_argument("--words", nargs="*", default=[], metavar="KEY=VALUE", help="with --config: its overrides")
    parser.add_argument("--shuffle", metavar="SHARDSxSAMPLES", help="measure the order of such a data set instead")
    parser.add_argument("--lanes", type=int, default=8, help="with --shuffle")
    parser.add_argument("--window", type=int, default=4, help="with --shuffle")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.init()  # which a run has done by then: data.resident=device is the GPU
    if arguments.shuffle:
        shards, _, samples = arguments.shuffle.partition("x")
        quality = shuffle_quality(int(shards), int(samples), arguments.lanes, arguments.window, arguments.batch)
        print("relative to a uniform shuffle: same-shard pairs {:.3f}, pairs that meet again {:.3f}".format(*quality))
        return
    if arguments.config:
        config, figures = load(arguments.config, arguments.words), dict[str, dict[str, float]]()
        for workers in arguments.workers:
            rounds = [of_recipe(config, arguments.samples, workers) for _ in range(arguments.rounds)]
            wall, cpu = (statistics.median(found[k] for found in rounds) for k in range(2))
            figures[f"{workers} workers"] = {"samples_per_s": wall, "samples_per_cpu_s": cpu}
            print(f"{workers} workers {wall:10,.0f} samples/s {cpu:10,.0f} samples/CPU-s", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        name = make_photos(Path(folder), arguments.photos) if arguments.photos else arguments.data or "emoji/train"
        changes = schema.ImageAugmentation(randaugment=arguments.randaugment)
        data = schema.Data(train=name, image_size=arguments.image_size, augmentation=changes)
        if arguments.parts:
            rows = [parts_of_a_sample(data, arguments.samples, arguments.batch) for _ in range(arguments.rounds)]
            medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            print("\n".join(f"{key:>28} {ms:8.3f} ms per sample" for key, ms in medians.items()), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(medians, indent=1) + "\n")
            return
        held = {
            "ours" + f" ({where})" * (where != "none") + ", on the device" * (place == "device"): data.model_copy(
                update={"resident": where, "augment_on": place}
            )
            for where in arguments.resident
            for place in arguments.augment_on
        }
        index = open_index(data)
        steps = -(-arguments.samples // arguments.batch)
        figures = {}

        def measure(label: str, *runs: tuple[str, Callable[[], int]]) -> None:
            rounds = [{key: timed(run) for key, run in runs} for _ in range(arguments.rounds)]
            for key, _ in runs:
                wall, cpu = (statistics.median(found[key][k] for found in rounds) for k in range(2))
                figures[f"{key} {label}".strip()] = {"samples_per_s": wall, "samples_per_cpu_s": cpu}
                print(f"{key:>28} {label:10} {wall:10,.0f} samples/s {cpu:10,.0f} samples/CPU-s", flush=True)

        measure(
            "",
            ("reading by offset", lambda: read_by_offset(index)),
            ("reading front to back", lambda: read_front_to_back(index)),
        )
        for workers in arguments.workers:
            measure(
                f"{workers} workers",
                *(
                    (name, lambda n=workers, one=one: ours(one, arguments.batch, steps, n))
                    for name, one in held.items()
                ),
                ("webdataset", lambda n=workers: plain_webdataset(index, data, arguments.batch, steps, n)),  # type: ignore[misc]
            )
            first, second = (figures[f"{key} {workers} workers"] for key in (next(iter(held)), "webdataset"))
            ratios = [first[key] / second[key] for key in ("samples_per_s", "samples_per_cpu_s")]
            print(
                f"{'ours / webdataset':>28} {workers} workers  {ratios[0]:10.2f} {'':9} {ratios[1]:10.2f}", flush=True
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
