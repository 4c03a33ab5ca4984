"""Where a sample's time goes on its way from a shard to a batch, part by part: for tools/benchmark_loader.py."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from amclr_scale.config import schema
from amclr_scale.data.augmentation.plans import most_operations
from amclr_scale.data.augmentation.shipping import Shipment
from amclr_scale.data.decoding import Field, Sample, decode
from amclr_scale.data.image_views import augmented_view, reduction_for, to_tensor
from amclr_scale.data.indexing import IMAGE_EXTENSIONS, open_index
from amclr_scale.data.randomness import Draws
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.errors import UserError
from amclr_scale.torchvision_ops import import_torchvision


def parts_of_a_sample(data: schema.Data, samples: int, batch: int) -> dict[str, float]:
    """Milliseconds of a sample by part: of CPU, and for the way out of a worker of the wall."""
    index, size, recipe = open_index(data), data.image_size, data.augmentation
    places = [(shard, row) for shard, entry in enumerate(index.shards) for row in range(entry.num_samples)][:samples]
    if batch > len(places):
        raise UserError(f"--batch: expected at most the {len(places):,} samples that are measured, got {batch:,}")
    wanted, tokenizer = frozenset({*IMAGE_EXTENSIONS, "txt"}), load_tokenizer(data.tokenizer, data.context_length)
    found = dict[str, float]()

    def each(name: str, run: Callable[[Any], Any], over: list[Any]) -> list[Any]:
        run(over[0])  # whatever a library does once
        begin = time.process_time()
        answers = [run(one) for one in over]
        found[name] = 1e3 * (time.process_time() - begin) / len(places)
        return answers

    def decoded(content: Sample, *, whole: bool = False) -> Image.Image:
        opened = content.image()
        return decode(opened, 1 if whole else reduction_for(opened, size, [recipe]))

    read = each("reading", lambda place: index.reader(place[0]).read(place[1], wanted), places)
    contents = [Sample(one, data.max_image_pixels, data.max_caption_characters) for one in read]
    pictures = each("decoding", decoded, contents)
    each("decoding at full size", lambda one: decoded(one, whole=True), contents)
    encoded = [bytearray(next(value for key, value in one.items() if key in IMAGE_EXTENSIONS)) for one in read]
    raw = [torch.frombuffer(one, dtype=torch.uint8) for one in encoded]
    try:
        torchvision_io = import_torchvision().io
        each("decoding by torchvision.io", lambda one: torchvision_io.decode_image(one, mode="RGB"), raw)
    except (AttributeError, ImportError, RuntimeError) as error:  # a format, or a build, that it has no decoder for
        print(f"torchvision.io: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    numbered = list(enumerate(pictures))

    def shipped(one: tuple[int, Image.Image]) -> torch.Tensor:
        shipment = Shipment(size, most_operations(recipe), range(0))
        shipment.row_of_one(one[1], Draws(0, one[0]), recipe)
        return shipment.pixels()

    sent = each("pixels for the device", shipped, numbered)
    views = each("crop and change", lambda one: augmented_view(one[1], size, recipe, Draws(0, one[0])), numbered)
    tensors = each("to tensors", to_tensor, views)
    captions = [one.captions(Field("txt"))[0] for one in contents]
    groups = [slice(start, start + batch) for start in range(0, len(places), batch)]
    each("tokens", lambda own: tokenizer(captions[own]), groups)
    (joined, *_) = each("joining a batch", lambda own: torch.stack(tensors[own]), groups)
    found["out of a worker (wall)"] = out_of_a_worker(joined) / len(joined)
    found["pixels out of a worker (wall)"] = out_of_a_worker(torch.cat(sent[:batch])) / batch
    return found


def out_of_a_worker(tensor: torch.Tensor) -> float:
    """Milliseconds from a worker process to this one."""
    copies: Any = [tensor.clone() for _ in range(12)]  # each goes into shared memory when a worker sends it
    ready = iter(torch.utils.data.DataLoader(copies, batch_size=None, num_workers=1))
    next(ready)  # the worker has started
    begin = time.perf_counter()
    count = sum(1 for _ in ready)
    return 1e3 * (time.perf_counter() - begin) / count
