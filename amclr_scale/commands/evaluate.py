"""Evaluate trained models: retrieval, zero-shot, probes, geometry, with intervals, beside one another.

    amclr-scale evaluate runs/NAME
    amclr-scale evaluate runs/A runs/B --suite emoji
    amclr-scale evaluate runs/NAME --suite datacomp38 --data /data/evalsets
    torchrun --nproc-per-node 8 launch/evaluate.py open_clip/ViT-B-32:FILE --suite configs/evaluation/retrieval.yaml

A suite is a YAML file with a section `evaluation` (and `data`, where captions are elsewhere), called as its file is, or
NAME=FILE; without one, what the run itself measured is measured again. Several models are compared item by item with
the first.

With --data, a suite is one of datacomp38, clip_benchmark_vtab, retrieval, sugarcrepe, winoground and aro, and --data
is the folder that holds its data sets. Finished data sets are kept: the same command again goes on.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from amclr_scale.commands.words import command_parser, refused
from amclr_scale.config.load import build, from_words, merge, read_file
from amclr_scale.config.schema import Config
from amclr_scale.config.shipped import find
from amclr_scale.distributed.launcher import RankInfo, end_with_launcher, read_rank_info
from amclr_scale.errors import AbsentError, UserError


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("evaluate", __doc__)
    parser.add_argument(
        "checkpoints",
        nargs="+",
        help="run folders, their checkpoints, exported folders, open_clip/ARCHITECTURE:FILE, transformers/FOLDER",
    )
    parser.add_argument(
        "--suite", action="append", default=[], metavar="[NAME=]FILE", help="what to measure; may be repeated"
    )
    parser.add_argument("--data", metavar="FOLDER", help="the data sets of a suite of papers, such as datacomp38")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="such as evaluation.batch_size=512"
    )
    parser.add_argument("--output", metavar="FOLDER", help="results go here (a run: evaluation/ in its folder)")
    parser.add_argument(
        "--precision",
        choices=["run", "fp32", "bf16", "fp16"],
        default="run",
        help="what models compute in; run: what each was trained in (others' models: fp32)",
    )
    parser.add_argument(
        "--sheet", type=int, default=0, metavar="N", help="draw N captions found and N missed per split"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def suites_by_name(given: list[str]) -> dict[str, str]:
    """Name -> file of every suite: NAME=FILE, or as the file is called.

    Raises:
        UserError: two have one name.
    """
    found: dict[str, str] = {}
    for words in given:
        name, equals, file = words.partition("=")
        if not equals or Path(words).exists():
            name, file = Path(words).stem, words
        if name in found:
            raise UserError(f"--suite: expected names that differ, got {name} twice; such as --suite other={file}")
        found[name] = file
    return found


def laid_over(config: Config, suites: Iterable[str], words: list[str]) -> Config:
    """A model's configuration with the suites' and the command line's keys over it."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["data"]["allow_pipe"] = False  # a folder from elsewhere must not choose a shell command and allow it too
    for suite in suites:
        above = read_file(find(suite, "evaluation"), argument="--suite")
        foreign = set(above) - {"evaluation", "data"}
        if foreign:
            raise UserError(
                f"{suite}: expected the sections evaluation and data only, got {', '.join(sorted(foreign))}"
            )
        tree = merge(tree, above)
    return build(merge(tree, from_words(words)), trusted=False)


SAME = ("resize", "clean_captions", "caption", "classes", "class_names", "templates")


def check_same_measure(first: Config, other: Config) -> None:
    """Raise `UserError` where two models would be compared by different measures."""
    sections = [
        config.evaluation.model_copy(update={"caption": config.evaluation.caption or config.data.caption})
        for config in (first, other)
    ]
    for key in SAME:
        here, there = (getattr(section, key) for section in sections)
        if here != there:
            raise UserError(
                f"evaluation.{key}: expected one value for all models that are compared, got {here!r} and {there!r}; "
                f"say which in a suite, or by --set evaluation.{key}=..."
            )


def _run_suites(options: argparse.Namespace, device: Any) -> None:
    """The suites of papers, which evaluation/suites knows."""
    from amclr_scale.evaluation.suites.catalogue import SUITES, suite
    from amclr_scale.evaluation.suites.command import measure
    from amclr_scale.trained.model import open_model

    if options.sheet:
        raise UserError("--sheet: expected no sheet beside --data; draw one with --set evaluation.splits=[...]")
    if not options.suite:
        raise UserError(f"--suite: expected one of {', '.join(SUITES)} beside --data, got none")
    measure(
        options.checkpoints, [suite(name) for name in dict.fromkeys(options.suite)], Path(options.data).expanduser(),
        opens=open_model, device=device, words=options.set, precision=options.precision,
        output=Path(options.output).expanduser() if options.output else None,
    )  # fmt: skip


def _check_data_is_named(suites: Iterable[str]) -> None:
    """Raise `UserError` for a suite of papers whose data sets nobody has named."""
    from amclr_scale.evaluation.suites.catalogue import SUITES

    for name in suites:
        if name in SUITES and not find(name, "evaluation").is_file():
            raise UserError(f"--data: expected the folder that holds the data sets of {name}, got none")


def run(options: argparse.Namespace, rank_info: RankInfo) -> None:
    """Start what ranks need, measure, and stop it."""
    import torch

    from amclr_scale.distributed.process_group import device_type, keep_float32, start, stop

    keep_float32()  # as in training
    device = torch.device(device_type())
    if rank_info.world_size > 1:
        device = start(rank_info)
    if options.sheet < 0:
        raise UserError(f"--sheet: expected 0 or more, got {options.sheet}")
    if options.data:
        _run_suites(options, device)
    else:
        _run_splits(options, rank_info, device)
    if rank_info.world_size > 1:
        stop()


def _run_splits(options: argparse.Namespace, rank_info: RankInfo, device: Any) -> None:
    """The flow: models -> splits -> numbers -> table, files, sheets."""
    from amclr_scale.evaluation.models import check_reading, compute_in, name_beside, use_statistics
    from amclr_scale.evaluation.progress import EvaluationProgress
    from amclr_scale.evaluation.report import comparison_lines, comparisons, histogram_lines, made, write
    from amclr_scale.evaluation.run import Evaluator
    from amclr_scale.evaluation.sheet import NOTHING, text_to_image_sheet
    from amclr_scale.evaluation.table import side_by_side, table
    from amclr_scale.evaluation.temperatures import Histogram, read_temperatures
    from amclr_scale.trained.model import open_model

    speaks = rank_info.rank == 0
    results: dict[str, dict[str, float]] = {}
    measured: dict[str, Any] = {}
    compared: dict[str, Any] = {}
    learned: dict[str, dict[str, Histogram]] = {}
    precision: dict[str, str] = {}
    prompts: list[str] = []
    folder: Path | None = Path(options.output).expanduser() if options.output else None
    resamples = 0
    first_config: Config | None = None
    suites = suites_by_name(options.suite)
    _check_data_is_named(suites.values())
    for checkpoint in options.checkpoints:
        loaded = open_model(checkpoint)
        config = laid_over(loaded.config, suites.values(), options.set)
        if not config.evaluation.splits and not config.evaluation.probes:
            raise UserError("--suite: expected something to measure; give a suite, or --set evaluation.splits=[...]")
        first_config = first_config or config
        check_same_measure(first_config, config)
        folder = folder or (loaded.folder or Path("runs")) / "evaluation" / loaded.step
        check_reading(loaded, config.data)
        if speaks and not results:
            made(folder)
        evaluator = Evaluator(config, rank=rank_info.rank, world_size=rank_info.world_size, reading=loaded.reading)
        use_statistics(loaded, config.data)
        name = name_beside(loaded, checkpoint, results)
        precision[name] = compute_in(loaded, options.precision, device)
        prompts = prompts or evaluator.prompts()
        model = loaded.model.to(device)
        begin = time.perf_counter()
        with EvaluationProgress(checkpoint, evaluator.items(), speaks=speaks) as progress:
            encode = progress.watch(model)
            results[name], measured[name] = evaluator.measure(encode), evaluator.numbers
            drawable = [one for one in enumerate(evaluator.tasks) if options.sheet and one[1].retrieval]
            for number, task in drawable:
                progress.more(task.pairs_here())
                sheet = text_to_image_sheet(encode, task, config.evaluation.batch_size, options.sheet)
                if speaks:
                    sheet.save(folder / f"sheet_{len(results)}_{number}.png")
        if speaks:
            if options.sheet and not drawable:
                print(NOTHING.replace("evaluation.sheet", "--sheet"), file=sys.stderr, flush=True)
            by = f", by {' and '.join(suites)}" if suites else ""
            print(f"{checkpoint}, in {precision[name]}{by}, {time.perf_counter() - begin:.1f} s", flush=True)
            if sides := read_temperatures(loaded.state):
                learned[name] = sides
        resamples = config.evaluation.resamples
    first = next(iter(results))
    if speaks:
        shown = table(results[first]) if len(results) == 1 else side_by_side(results)
        histograms = ["\n".join(histogram_lines(sides)) for sides in learned.values()]
        print("\n" + "\n\n".join([shown, *prompts, *histograms]), end="\n\n")
    for name in list(results)[1:]:
        pair = f"{name} against {first}"
        compared[pair] = comparisons(measured[first], measured[name], resamples=resamples or 1000)
        if speaks:
            print(
                f"{pair}: percentage points, paired, 95 % interval\n  " + "\n  ".join(comparison_lines(compared[pair]))
            )
    if speaks and folder is not None:
        write(folder, results, compared, learned, precision=precision, prompts=prompts, suites=list(suites))
        print(f"results.json and results.md in {folder}")


def main(argv: list[str]) -> int:
    """Run, and say a user's mistake in one line."""
    rank_info = RankInfo()
    options = arguments(argv)
    try:
        rank_info = read_rank_info()
        if rank_info.world_size > 1:
            end_with_launcher()  # before the seconds that imports take
        run(options, rank_info)
    except UserError as error:
        if rank_info.local_rank:
            time.sleep(5)
        print(f"\n{error}", file=sys.stderr, flush=True)
        if rank_info.world_size > 1:
            sys.stdout.flush()
            os._exit(2)  # others may be waiting in a collective
        return 2
    except AbsentError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if rank_info.world_size > 1:
            os._exit(128 + signal.SIGINT)
        return 128 + signal.SIGINT
    except Exception as error:
        if (told := refused(error, "--output")) is None:
            raise
        print(f"\n{told[1]}", file=sys.stderr, flush=True)
        if rank_info.world_size > 1:
            sys.stdout.flush()
            os._exit(told[0])
        return told[0]
    return 0
