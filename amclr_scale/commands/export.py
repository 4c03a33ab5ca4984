"""Turn a checkpoint, or the newest one of a run, into a folder that others can use, or a repository of a hub.

    amclr-scale export runs/quickstart --out my_model
    amclr-scale export runs/quickstart/checkpoints/step_00001000 --to transformers --out my_model
    amclr-scale export runs/quickstart --push me/my_model

--to safetensors: plain weights with config.yaml, tokenizer and a card; read by `amclr_scale.load(FOLDER)`.
--to transformers: also what `transformers.AutoModel.from_pretrained(FOLDER)` reads, once
`amclr_scale.trained.as_transformers` is imported. --to transformers_dual_encoder: also transformers' own CLIP, SigLIP,
Chinese-CLIP or VisionTextDualEncoder, which needs nothing of ours, of a model that has their parts. --to open_clip:
also what `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads, for open_clip's own towers, and for
timm's beside BERT-like ones. Other libraries have no features of inner layers (model.*.taps): the last two leave them
out. No pickles, no code in any of them.

--push OWNER/NAME publishes the same, with its card, as a repository of the Hugging Face hub; a folder that export wrote
can be pushed too. A repository that is not there is made, private unless --public is given; in one that is, files of
other names stay. Hidden files are not pushed, nor is what `evaluate` left in the folder's evaluation/, unless the card
names it; links out of the folder are refused. The token is that of
`hf auth login`, or HF_TOKEN. Needs huggingface_hub, which transformers brings.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from amclr_scale.commands.words import command_parser, run_command
from amclr_scale.config.load import load
from amclr_scale.errors import UserError


def _transformers() -> Callable[[Path], None]:
    from amclr_scale.trained import as_transformers

    return as_transformers.write


def _dual_encoder() -> Callable[[Path], None]:
    from amclr_scale.trained import as_dual_encoder

    return as_dual_encoder.write


def _open_clip() -> Callable[[Path], None]:
    from amclr_scale.trained import as_open_clip

    return as_open_clip.write


FORMS: dict[str, Callable[[], Callable[[Path], None] | None]] = {
    "safetensors": lambda: None,
    "transformers": _transformers,
    "transformers_dual_encoder": _dual_encoder,
    "open_clip": _open_clip,
}
WITHOUT_TAPS = ("transformers_dual_encoder", "open_clip")


def push(args: argparse.Namespace) -> None:
    """Export into a temporary folder, and publish that; or say what would be published."""
    from amclr_scale.trained.publish import check_name, files_of, prepare, publish

    check_name(args.push)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stays = prepare(args.checkpoint, folder, args.push, FORMS[args.to](), args.which)
        if stays.hidden:
            print(f"--push: hidden files stay here: {', '.join(stays.hidden)}", file=sys.stderr)
        if stays.measured:
            print(
                f"--push: results of evaluate stay here: {', '.join(stays.measured)}; those that the card, README.md, "
                "names are pushed with it",
                file=sys.stderr,
            )
        tell_of_taps(folder, args.to)
        if args.dry_run:
            files = files_of(folder)
            width = max(map(len, files))
            print("\n".join(f"{name:<{width}}  {size:>15,} bytes" for name, size in files.items()))
            print(f"would go to {args.push}; nothing was uploaded")
            return
        done = publish(folder, args.push, public=args.public)
    visible = "public" if args.public else "private"
    what = f"made, {visible}" if done.made else "there already: who can see it is as it was"
    print(f"{len(done.files)} files, {sum(done.files.values()) / 2**20:.1f} MiB -> {done.url} ({what})")


def work(argv: list[str]) -> None:
    """Check the command, export, publish."""
    parser = command_parser("export", __doc__)
    parser.add_argument("checkpoint", help="a run folder, or one of its checkpoints; also its address in a store")
    parser.add_argument("--to", choices=list(FORMS), default="safetensors")
    parser.add_argument(
        "--which", choices=("weights", "momentum"), default="weights", help="momentum: their moving average"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="a new folder")
    where.add_argument("--push", metavar="OWNER/NAME", help="a repository of the hub")
    parser.add_argument("--public", action="store_true", help="with --push: everybody can see a repository it makes")
    parser.add_argument("--dry-run", action="store_true", help="with --push: list what would go there, ask no hub")
    args = parser.parse_args(argv)
    if args.push:
        push(args)
        return
    if alone := [f"--{name}" for name in ("public", "dry-run") if getattr(args, name.replace("-", "_"))]:
        raise UserError(f"{alone[0]}: expected it beside --push OWNER/NAME")
    from amclr_scale.trained.export import export  # seconds of imports, after what can be wrong with the command

    print(f"{export(args.checkpoint, args.out, FORMS[args.to](), args.which)} -> {args.out}")
    tell_of_taps(args.out, args.to)


def tell_of_taps(folder: Path, form: str) -> None:
    """Say where another library's files leave something of the model out."""
    model = load(folder / "config.yaml", trusted=False).model
    tapped = [f"model.{side}.taps" for side in ("image", "text") if getattr(model, side).taps]
    if tapped and form in WITHOUT_TAPS:
        print(
            f"--to {form}: {' and '.join(tapped)} are not in that library's files, which have no features of inner "
            "layers; amclr_scale.load(FOLDER) has them",
            file=sys.stderr,
        )


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 a mistake, a token or a hub that refuses, told in words."""
    return run_command(work, argv)
