"""Turn a checkpoint, or the newest one of a run, into a folder that others can use.

    amclr-scale export runs/quickstart --out my_model
    amclr-scale export runs/quickstart/checkpoints/step_00001000 --to transformers --out my_model

--to safetensors: plain weights with config.yaml, tokenizer and a card; read by `amclr_scale.load(FOLDER)`.
--to transformers: also what `transformers.AutoModel.from_pretrained(FOLDER)` reads, once
`amclr_scale.trained.as_transformers` is imported. --to transformers_dual_encoder: also transformers' own CLIP, SigLIP,
Chinese-CLIP or VisionTextDualEncoder, which needs nothing of ours, of a model that has their parts. --to open_clip:
also what `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads, for open_clip's own towers, and for
timm's beside BERT-like ones. Other libraries have no features of inner layers (model.*.taps): the last two leave them
out. No pickles, no code in any of them.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from amclr_scale.commands.words import command_parser
from amclr_scale.config.load import load
from amclr_scale.errors import UserError
from amclr_scale.trained.export import export


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


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 a mistake, told in words."""
    parser = command_parser("export", __doc__)
    parser.add_argument("checkpoint", help="a run folder, or one of its checkpoints; also its address in a store")
    parser.add_argument("--to", choices=list(FORMS), default="safetensors")
    parser.add_argument(
        "--which", choices=("weights", "momentum"), default="weights", help="momentum: their moving average"
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args(argv)
    try:
        used = export(args.checkpoint, args.out, FORMS[args.to](), args.which)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{used} -> {args.out}")
    model = load(args.out / "config.yaml", trusted=False).model
    tapped = [f"model.{side}.taps" for side in ("image", "text") if getattr(model, side).taps]
    if tapped and args.to in WITHOUT_TAPS:
        print(
            f"--to {args.to}: {' and '.join(tapped)} are not in that library's files, which have no features of inner "
            "layers; amclr_scale.load(FOLDER) has them",
            file=sys.stderr,
        )
    return 0
