"""Make the corpus of icons: a third of a million pictures with names, by two hundred artists, under free licences.

    fetch the archive, check it  ->  sets whose licence allows it  ->  draw every icon (a process per set)
    ->  keep one of equal pictures  ->  splits  ->  shards, index, credits

Everything is a function of the archive and the settings: any number of processes writes the same bytes. What is begun
goes on where it stopped: a set that is drawn and a shard that is written are not made again.
"""

import json
import multiprocessing
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL
from PIL import features
from rich.console import Console
from rich.progress import Progress, track

from amclr_scale.corpora.credits import write_credits
from amclr_scale.corpora.families import families
from amclr_scale.corpora.icon_names import Meaning, Names, kind_of
from amclr_scale.corpora.icon_sets import IconSet, unpack, why_left_out
from amclr_scale.corpora.icon_shards import About, ShardJob, write_shard
from amclr_scale.corpora.icon_splits import LEFT_OUT, Picture, Sizes, assign, choose_families
from amclr_scale.corpora.npm import NpmPackage
from amclr_scale.corpora.rendering import RenderJob, render, resvg
from amclr_scale.data.indexes.entries import write_index
from amclr_scale.data.indexing import build
from amclr_scale.data.randomness import permutation
from amclr_scale.data.storage import Storage
from amclr_scale.errors import UserError

PACKAGE = NpmPackage(
    "@iconify/json",
    "2.2.535",
    "iconify-json-2.2.535.tgz",
    "sha512-nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw==",
)
SEED = 0
REPORT = "corpus.json"


@dataclass(frozen=True)
class Settings:
    """What decides the bytes.

    Attributes:
        size: pixels of a side.
        form: webp or png, both without loss.
        per_shard: samples of a shard.
    """

    size: int = 48
    form: str = "webp"
    per_shard: int = 10_000
    splits: Sizes = field(default_factory=Sizes)


def make(out: Path, settings: Settings, archive: Path | None = None, workers: int = 0) -> dict[str, Any]:
    """Make the corpus in `out`; its report, which lies there as corpus.json.

    Args:
        archive: the pinned release, where it is there already.
        workers: processes; 0: this one.

    Raises:
        UserError: the archive cannot be had or is another; resvg-py is missing; `out` holds something else.
    """
    drawn_by = getattr(resvg(), "__version__", "")
    plan = {
        "package": f"{PACKAGE.name} {PACKAGE.version}",
        "integrity": PACKAGE.integrity,
        "made_with": {"resvg_py": drawn_by, "pillow": PIL.__version__, "webp": features.version("webp")},
        "settings": asdict(settings),
    }
    work = out / ".work"
    finished = _begin(out, work, plan)
    if finished:
        return finished
    console = Console(stderr=True)
    with console.status("Checking and unpacking the archive"):
        path = PACKAGE.verified(archive) if archive else PACKAGE.fetch(work)
        sets = unpack(path, work / "sets")
    kept = [one for one in sets if one.names and not why_left_out(one.licence)]
    with _processes(workers) as run:
        pictures, meanings, rejected = _draw(kept, work, settings, run, console)
        kinds = {one.prefix: kind_of(one) for one in kept}
        held = choose_families(pictures, kinds, settings.splits)
        splits = assign(pictures, held, settings.splits)
        about = {one.prefix: About(one.title, kinds[one.prefix], one.licence) for one in kept}
        left_out = splits.pop(LEFT_OUT)
        _write(out, splits, meanings, about, work, settings, run, workers, console)
    for one in sets:
        rejected["withdrawn by the artist"] += one.hidden
        rejected[f"licence: {why_left_out(one.licence)}"] += 0 if one in kept else len(one.names)
    report = plan | {
        "read": sum(len(one.names) + one.hidden for one in sets),
        "rejected": dict(sorted((reason, n) for reason, n in rejected.items() if n)),
        "kept": len(pictures),
        "in_no_split": len(left_out),
        "concepts": len({picture.concept for picture in pictures}),
        "sets": len({picture.prefix for picture in pictures}),
        "held_out": {"val": list(held.val), "tune": list(held.tune)},
        "splits": {
            name: {"samples": len(found), "concepts": len({one.concept for one in found})}
            for name, found in splits.items()
        },
        "licences": dict(sorted(Counter(about[picture.prefix].licence for picture in pictures).items())),
        "kinds": dict(sorted(Counter(kinds[picture.prefix] for picture in pictures).items())),
    }
    write_credits(out, sets, pictures, splits, kinds)
    _save(out / REPORT, report)
    shutil.rmtree(work)
    return report


def _begin(out: Path, work: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Check what is in `out`; the report, where it holds the whole corpus.

    Raises:
        UserError: it holds something else.
    """
    plan = json.loads(json.dumps(plan))
    for file in (out / REPORT, work / "plan.json"):
        if file.is_file():
            before: dict[str, Any] = json.loads(file.read_text())
            different = [key for key in plan if before.get(key) != plan[key]]
            if different:
                raise UserError(
                    f"--out: {out} was begun with another {different[0]} ({file}): expected {plan[different[0]]}, got "
                    f"{before.get(different[0])}; choose an empty folder"
                )
            if file.name == REPORT:
                shutil.rmtree(work, ignore_errors=True)
            return before if file.name == REPORT else None
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out: expected an empty folder or one that this command began, got {out}")
    work.mkdir(parents=True)
    _save(work / "plan.json", plan)
    return None


def _save(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    partial.replace(path)


Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextmanager
def _processes(workers: int) -> Iterator[Run]:
    """`map`, in this process or in several."""
    if not workers:
        yield map
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _draw(
    sets: list[IconSet], work: Path, settings: Settings, run: Run, console: Console
) -> tuple[list[Picture], dict[str, Meaning], Counter[str]]:
    """Draw all icons; the pictures that differ from one another, by set and name, what they mean, what was left out.

    Of equal pictures the first is kept, whatever they are called.
    """
    largest_first = sorted(sets, key=lambda one: -len(one.names))
    jobs = {
        one.prefix: RenderJob(work / "sets" / f"{one.prefix}.json", work / "drawn", settings.size, settings.form)
        for one in largest_first
    }
    sizes = {one.prefix: len(one.names) for one in sets}
    with Progress(console=console) as progress:
        bar = progress.add_task("Drawing", total=sum(sizes.values()))
        for prefix in run(render, jobs.values()):
            progress.advance(bar, sizes[prefix])
    rejected = Counter[str]()
    first: dict[str, Picture] = {}
    meanings: dict[str, Meaning] = {}
    digests: dict[str, list[str]] = {}
    for one in sets:
        drawn, counts = jobs[one.prefix].drawn()
        names = Names(one)
        rejected.update(counts)
        digests[one.prefix] = [drawing.digest for drawing in drawn]
        for drawing in drawn:
            meaning = names.read(drawing.name)
            picture = Picture(
                one.prefix, drawing.name, drawing.digest, drawing.offset, drawing.length, meaning.concept,
                one.categories.get(drawing.name, ""), "",
            )  # fmt: skip
            before = first.setdefault(drawing.digest, picture)
            if before is picture:
                meanings[picture.key] = meaning
            else:
                same = before.concept == picture.concept
                rejected["copy, same concept" if same else "copy, another concept"] += 1
    family = families(sets, digests)
    return [replace(picture, family=family[picture.prefix]) for picture in first.values()], meanings, rejected


def _write(
    out: Path,
    splits: dict[str, list[Picture]],
    meanings: dict[str, Meaning],
    about: dict[str, About],
    work: Path,
    settings: Settings,
    run: Run,
    workers: int,
    console: Console,
) -> None:
    """Shuffle every split once, and write its shards and its index."""
    jobs = list[ShardJob]()
    for split, pictures in splits.items():
        order = permutation(len(pictures), SEED, int.from_bytes(split.encode(), "big")).tolist()
        for number, start in enumerate(range(0, len(order), settings.per_shard)):
            chosen = [pictures[i] for i in order[start : start + settings.per_shard]]
            rows = [(picture, meanings[picture.key]) for picture in chosen]
            jobs.append(ShardJob(out / split, number, work / "drawn", settings.form, rows, about))
    list(track(run(write_shard, jobs), "Writing shards", total=len(jobs), console=console))
    paths = [job.path.absolute() for job in jobs]
    tables = [path.parent / "members" / f"{path.name.split('.')[0]}.npz" for path in paths]
    with tempfile.TemporaryDirectory(dir=work) as cache:
        shards = build([str(path) for path in paths], tables, Storage(Path(cache)), workers)
    for split in splits:
        own = [shard for shard, path in zip(shards, paths, strict=True) if path.parent.name == split]
        if own:
            write_index(paths[0].parent.with_name(split) / "index.json", f"icons-{split}", own)
