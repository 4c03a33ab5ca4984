"""Turn images and annotation files into shards with an index.

    amclr-scale shards make annotations --annotations cc3m_train_subset.json --images cc3m/ --out shards/cc3m
    amclr-scale shards make karpathy --annotations dataset_coco.json --images coco/ --split train --out out/
    amclr-scale shards make folder --images photos/ --out shards/photos --resize 256 --workers 8

Formats: folder, annotations (SogCLR, iSogCLR, AmCLR, ALBEF), coco, karpathy, flickr30k, table (CC3M, CC12M with
downloaded images); amclr_scale/data/ingestion.py says what each looks like. img2dataset's output and CLIP_benchmark's
wds_* folders are shards already: train on them as they stand, or index them with amclr-scale shards index.

Samples are shuffled once, so that a shard is a fair sample. What cannot be used (no file, no caption, a broken image)
is listed in rejects.jsonl with the reason. Each shard appears whole or not at all, and an interrupted run goes on.
"""

import hashlib
import io
import json
import multiprocessing
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from amclr_scale.commands.words import check_at_least, command_parser, run_command
from amclr_scale.config import schema
from amclr_scale.data.captions.accepted import limit_captions, words_of_nothing
from amclr_scale.data.decoding import BadSampleError
from amclr_scale.data.formats.encoding import NOTHING_STORED, Encoding, encode, picture_of
from amclr_scale.data.formats.tables import SEPARATORS
from amclr_scale.data.formats.typed_tables import read_pictures
from amclr_scale.data.indexes.entries import write_index
from amclr_scale.data.indexing import build
from amclr_scale.data.ingestion import FORMATS, Annotations, Record, Reject, pairs, read_records
from amclr_scale.data.randomness import permutation
from amclr_scale.data.storage import make_storage
from amclr_scale.data.text_views import clean_caption
from amclr_scale.data.tokenizers import well_formed
from amclr_scale.errors import UserError


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    out: Path
    number: int
    records: list[Record]
    images: Path
    encoding: Encoding


def stored_as(clean: bool) -> Callable[[str], str]:
    """What makes a caption the text that is stored."""
    last = clean_caption if clean else str.strip
    return lambda caption: last(well_formed(caption))


def write_shard(job: Job) -> tuple[int, int]:
    """Write one shard and its rejects; (samples, rejects). Does nothing where it is there already."""
    path = job.out / f"{job.number:05d}.tar"
    rejects_path = job.out / "rejects" / f"{job.number:05d}.jsonl"
    if path.is_file() and rejects_path.is_file():
        rejected = len(rejects_path.read_text().splitlines())
        return len(job.records) - rejected, rejected
    partial = job.out / f".{path.name}.{os.getpid()}"  # `check_plan` removes what an interrupted run has left
    rejects, row = list[str](), 0
    stored = dict(read_pictures(record.stored for record in job.records if record.stored))
    with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
        for record in job.records:
            captions = [caption for caption in map(stored_as(job.encoding.clean), record.captions) if caption]
            try:
                if not captions:
                    raise BadSampleError("missing caption")
                extension, data, (width, height) = encode(picture_of(record, job.images, stored), job.encoding)
            except BadSampleError as error:
                reject = Reject(record.row, error.kind, error.detail, record.image)
                rejects.append(json.dumps(asdict(reject)))
                continue
            key = f"{job.number:05d}{row:05d}"
            content: dict[str, Any] = {"key": key, "captions": captions, "source": record.image, "row": record.row}
            content |= {"width": width, "height": height, **record.fields}
            content |= {} if record.image_id is None else {"image_id": record.image_id}
            for kind, member in ((extension, data), ("txt", captions[0].encode()), ("json", as_json(content))):
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
            row += 1
    rejects_path.write_text("".join(line + "\n" for line in rejects))
    partial.replace(path)
    return row, len(rejects)


def as_json(content: dict[str, Any]) -> bytes:
    """A sample's JSON."""
    text = json.dumps(content, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")  # JSON's own escapes, for paths that are not UTF-8


def number_images(records: list[Record]) -> list[Record]:
    """Give images dense numbers, in the order of their first appearance, where several records share one.

    `data.image_id` reads numbers below that of the samples, for which there is memory: `close_gaps` sees to it.
    """
    names = [record.image if record.image_id is None else str(record.image_id) for record in records]
    numbers: dict[str, int] = {}
    dense = [numbers.setdefault(name, len(numbers)) for name in names]
    alone = len(numbers) == len(records)
    return [
        replace(record, image_id=None if alone else number, fields=record.fields | _original(record))
        for record, number in zip(records, dense, strict=True)
    ]


def _original(record: Record) -> dict[str, Any]:
    return {} if record.image_id is None else {"source_image_id": record.image_id}


Numbers = dict[tuple[int, str], int]  # (row, image) of what a shard holds -> its image's number


def numbers_left(job: Job) -> Numbers:
    """Of the records of a shard that were written, the numbers that images were given at first."""
    lines = (job.out / "rejects" / f"{job.number:05d}.jsonl").read_text().splitlines()
    rejected = Counter((reject["row"], reject["image"]) for reject in map(json.loads, lines))
    there = Counter((record.row, record.image) for record in job.records)  # several, of a row with several captions
    numbers = {(record.row, record.image): record.image_id for record in job.records}
    return {one: int(number) for one, number in numbers.items() if number is not None and there[one] > rejected[one]}


def renumber(path: Path, numbers: Numbers) -> None:
    """Give the images of a shard other numbers, none of them longer: every byte but theirs stays where it is."""
    with path.open("r+b") as file, tarfile.open(path) as tar:
        for member in tar:
            if not member.name.endswith(".json"):
                continue
            file.seek(member.offset_data)
            content = json.loads(file.read(member.size))
            number = numbers[content["row"], content["source"]]
            if content["image_id"] != number:  # not yet, if an earlier run was interrupted here
                file.seek(member.offset_data)
                file.write(as_json(content | {"image_id": number}).ljust(member.size))


def close_gaps(jobs: list[Job], written: int) -> None:
    """Number images anew, in the same order, where those that are left have numbers beyond the number of samples.

    Which pictures are broken is known once all are written. Numbers follow from what is in the file and was rejected,
    so that a run which is interrupted in between comes to the same ones.
    """
    given = (record.image_id for job in jobs for record in job.records)
    if max((number for number in given if isinstance(number, int)), default=-1) < written:
        return  # as a rule; else rejects are read
    left = [numbers_left(job) for job in jobs]
    numbers = sorted({number for shard in left for number in shard.values()})
    if numbers[-1:] < [written]:
        return
    dense = {number: i for i, number in enumerate(numbers)}
    for job, shard in zip(jobs, left, strict=True):
        renumber(job.out / f"{job.number:05d}.tar", {one: dense[number] for one, number in shard.items()})


def check_plan(out: Path, plan: dict[str, Any]) -> None:
    """A folder is only continued with the plan that it was begun with.

    Raises:
        UserError: it was begun with another.
    """
    file = out / "make_shards.json"
    (out / "rejects").mkdir(parents=True, exist_ok=True)
    if file.is_file() and json.loads(file.read_text()) != plan:
        raise UserError(f"--out: {out} holds shards made with other arguments ({file}); choose an empty folder")
    file.write_text(json.dumps(plan, indent=1) + "\n")
    for left in out.glob(".*.tar.*"):
        left.unlink()


def work(argv: list[str]) -> None:
    """What `main` does, without the words for mistakes."""
    parser = command_parser("shards make", __doc__)
    parser.add_argument("format", choices=sorted(FORMATS))
    parser.add_argument(
        "--annotations", type=Path, help="annotation file, or a folder saved by Hugging Face's datasets"
    )
    parser.add_argument(
        "--images", type=Path, help="folder that image paths start from (default: that of the annotation file)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards and their index")
    parser.add_argument("--split", help="karpathy, flickr30k, datasets: which, such as train,restval")
    parser.add_argument(
        "--separator", choices=list(SEPARATORS), help="table: what stands between cells; default: decided"
    )
    parser.add_argument("--quoting", choices=("csv", "none"), help="table: whether quotes hold cells together")
    parser.add_argument("--image-column", metavar="NAME", help="table: name, or number from 0 without a header")
    parser.add_argument("--caption-column", metavar="NAME", help="table: name, or number from 0 without a header")
    parser.add_argument(
        "--layout", choices=("images", "pairs"), default="images", help="a sample per image, or per caption"
    )
    parser.add_argument("--per-shard", type=int, default=10_000, help="samples per shard")
    parser.add_argument("--shuffle-seed", type=int, default=0, help="-1: keep the order of the annotation file")
    parser.add_argument("--resize", type=int, help="reduce larger pictures to this shorter side")
    parser.add_argument(
        "--encode", choices=("keep", "jpg", "webp", "png"), default="keep", help="store pictures like this"
    )
    parser.add_argument("--quality", type=int, default=95, help="of jpg and webp")
    parser.add_argument(
        "--clean", action="store_true", help="captions in lower case, few marks, at most 30 words (ALBEF)"
    )
    parser.add_argument(
        "--max-caption-characters", type=int, default=schema.Data().max_caption_characters, metavar="N",
        help="reject longer captions (default: %(default)s, as data.max_caption_characters of a recipe)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, help="processes (default: this one)")
    arguments = parser.parse_args(argv)
    check_at_least(arguments, 1, "per_shard", "resize", "quality", "max_caption_characters")
    if arguments.quality > 100:
        raise UserError(f"--quality: expected at most 100, got {arguments.quality}")
    check_at_least(arguments, 0, "workers")

    if arguments.images is None and arguments.annotations is None:
        raise UserError("--images: expected the folder of the images, got none")
    images = arguments.images or arguments.annotations.parent
    source = Annotations(
        arguments.annotations, images, arguments.split, arguments.separator, arguments.quoting,
        arguments.image_column, arguments.caption_column,
    )  # fmt: skip
    found = read_records(arguments.format, source)
    limit_captions(found, arguments.max_caption_characters, stored_as(arguments.clean))
    if arguments.layout == "pairs":
        found.records = pairs(found.records)
    print("\n".join(filter(None, (found.told(), words_of_nothing(found)))), file=sys.stderr)
    records = number_images(found.records)
    seed = arguments.shuffle_seed
    order = range(len(records)) if seed < 0 else permutation(len(records), seed).tolist()
    encoding = Encoding(arguments.resize, arguments.encode, arguments.quality, arguments.clean)
    digest = hashlib.sha256(repr([(r.image, r.captions) for r in records]).encode()).hexdigest()
    settings = {"records": len(records), "digest": digest, "per_shard": arguments.per_shard, "shuffle_seed": seed}
    check_plan(arguments.out, {**settings, **asdict(encoding)})

    jobs = [
        Job(
            arguments.out,
            number,
            [records[i] for i in order[start : start + arguments.per_shard]],
            source.images,
            encoding,
        )
        for number, start in enumerate(range(0, len(records), arguments.per_shard))
    ]
    console = Console(stderr=True)
    if arguments.workers:
        with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            done = list(track(pool.map(write_shard, jobs), "Writing shards", total=len(jobs), console=console))
    else:
        done = [write_shard(job) for job in track(jobs, "Writing shards", console=console)]
    written = sum(n for n, _ in done)
    close_gaps(jobs, written)
    finish(arguments.out, len(records), written, found.rejects)


def finish(out: Path, read: int, written: int, unread: list[Reject]) -> None:
    """Join the lists of rejects, index the shards, say what was done: read = written + rejected.

    Args:
        read: records that were to be written.
        unread: rows and captions of the annotation file that are no records.

    Raises:
        UserError: nothing is left.
    """
    lines = [json.dumps(asdict(reject), ensure_ascii=False) for reject in unread]
    parts = [line for part in sorted((out / "rejects").glob("*.jsonl")) for line in part.read_text().splitlines()]
    (out / "rejects.jsonl").write_text("".join(f"{line}\n" for line in [*lines, *parts]), "utf-8")
    kinds = Counter(reject.kind for reject in unread if not reject.of_caption)
    kinds.update(json.loads(line)["kind"] for line in parts)
    rejected = kinds.total()
    if read != written + len(parts):
        raise RuntimeError(f"{read} records, {written} written, {len(parts)} rejected: {out} is not what was read")
    why = (
        f" ({', '.join(f'{number:,} {kind}' for kind, number in kinds.most_common())}; rejects.jsonl)" if kinds else ""
    )
    if not written:
        told = f"all {rejected:,} of {rejected:,} records were rejected{why}"
        found = [one["detail"] for one in map(json.loads, parts) if one["kind"] == "no such image"]
        astray = [detail for detail in found if detail != NOTHING_STORED]
        if 2 * len(astray) <= rejected:
            raise UserError(f"--annotations: {told}")
        raise UserError(f"--images: expected the folder that image paths start from; {told}, the first: {astray[0]}")
    urls = [str(path.absolute()) for path in sorted(out.glob("*.tar"))]
    tables = [out.absolute() / "members" / f"{Path(url).name}.npz" for url in urls]
    write_index(out.absolute() / "index.json", out.name, build(urls, tables, make_storage(schema.Data())))
    captions = Counter(reject.kind for reject in unread if reject.of_caption)
    beside = f"; left out {', '.join(f'{n:,} {kind}' for kind, n in captions.most_common())}" if captions else ""
    print(
        f"{out}: read {written + rejected:,}, wrote {written:,} samples in {len(urls):,} shards, rejected "
        f"{rejected:,}{why}{beside}"
    )


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 a mistake, told in words, 1 a full or closed disk."""
    return run_command(work, argv)
