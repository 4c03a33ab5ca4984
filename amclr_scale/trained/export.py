"""From a checkpoint to plain files: weights by name, configuration, tokenizer and a card. No DeepSpeed, no GPU.

    weights.safetensors   every weight, fp32        config.yaml   the resolved recipe, without paths
    tokenizer/            as it was trained with
    image_tower/, text_tower/                       the architecture of a tower of transformers, where it has one
    README.md             what it is and how it was made

`amclr_scale.load(FOLDER)` reads such a folder, wherever it is moved to, and so does launch/evaluate.py.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.cached import local_copy
from amclr_scale.checkpoint.files import read_state
from amclr_scale.checkpoint.pieces import AVERAGE, AVERAGED_BUFFER, MASTER
from amclr_scale.checkpoint.remote import is_url
from amclr_scale.checkpoint.state import TOKENIZER, open_pieces
from amclr_scale.config.load import build, dump
from amclr_scale.config.schema import Config
from amclr_scale.data.beside.features import sides_of
from amclr_scale.data.names import known_as, short_names
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.disk import save_tensors
from amclr_scale.distributed.process_group import seed_everything
from amclr_scale.encoders.libraries.transformers_parts import TOWERS, read_config
from amclr_scale.engine.build import model_of
from amclr_scale.engine.teacher import SCALE
from amclr_scale.errors import UserError
from amclr_scale.evaluation.report import in_words
from amclr_scale.evaluation.run import MOMENTUM
from amclr_scale.metrics.run_folder import MODULE
from amclr_scale.trained.portable import portable

Which = Literal["weights", "momentum"]


def weights_of(checkpoint: Path, which: Which = "weights") -> dict[str, Tensor]:
    """Every weight and buffer by name: parameters fp32, whoever held which part; buffers averaged over ranks.

    Args:
        which: the trained weights, or their moving average (where there is none of a weight, the weight).

    Raises:
        UserError: the checkpoint has no moving average.
    """
    reader = open_pieces(checkpoint)
    if which == "weights":
        weights = {name: reader.whole(name).contiguous() for name in reader.shapes}
        return {**weights, **reader.averaged_buffers()}
    momentum = read_state(checkpoint)["config"]["model"].get("momentum")
    if momentum is None or not reader.has_average:
        raise UserError(f"--which: expected weights, got momentum: {checkpoint} was saved without model.momentum")
    averaged = [n for n in reader.shapes if reader.has(AVERAGE, n) and (momentum.get("scale") or n not in SCALE)]
    kinds = dict.fromkeys(reader.shapes, MASTER) | dict.fromkeys(averaged, AVERAGE)
    weights = {name: reader.whole(name, kind).contiguous() for name, kind in kinds.items()}
    return {**weights, **reader.averaged_buffers(AVERAGED_BUFFER)}


def export(
    path: Path | str, out: Path, further: Callable[[Path], None] | None = None, which: Which = "weights", *,
    leaves: bool = True,
) -> Path:  # fmt: skip
    """Write the folder described above, or nothing; returns the checkpoint that was used.

    Args:
        path: a run folder or a checkpoint, or the address of one in a store, which is fetched into the cache.
        out: a new or an empty folder.
        further: writes more into the folder, such as another library's files.
        which: the trained weights, or their moving average.
        leaves: whether the folder is for other machines too: its configuration then has names, and no paths.

    Raises:
        UserError: no valid checkpoint at the path, it has no moving average, or `out` holds something already.
    """
    if is_url(str(path)):
        held = local_copy(str(path), "checkpoint")  # until all of it is read
        path = held.path
    checkpoint, _ = files.locate(Path(path), "checkpoint", "a checkpoint or a run folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: expected a new or an empty folder, got {out}")
    out.mkdir(parents=True, exist_ok=True)
    try:
        _write(checkpoint, out, which, leaves=leaves)
        if further is not None:
            further(out)
    except BaseException:  # what is there now cannot be told from a whole export
        shutil.rmtree(out)
        raise
    return checkpoint


def _write(checkpoint: Path, out: Path, which: Which, *, leaves: bool) -> None:
    state = read_state(checkpoint)
    config = build(state["config"], trusted=False)
    weights = weights_of(checkpoint, which) | _at_rest(config)
    save_tensors(weights, out / "weights.safetensors", metadata={"format": "pt"})
    module = checkpoint.parent.parent / MODULE
    if config.objective.get("module") is not None and module.is_file():
        shutil.copyfile(module, out / MODULE)
        config = config.model_copy(update={"objective": {**config.objective, "module": MODULE}})
    (out / "config.yaml").write_text(dump(portable(config) if leaves else config))
    own = checkpoint / TOKENIZER
    tokenizer = load_tokenizer(str(own) if own.is_dir() else config.data.tokenizer, config.data.context_length)
    tokenizer.check_saved(own)
    tokenizer.save(out / "tokenizer")
    for side, folder in TOWERS.items():
        library, _, name = getattr(config.model, side).name.partition("/")
        own = checkpoint.parent.parent / folder
        if own.is_dir():
            shutil.copytree(own, out / folder)
        elif library == "transformers" and (Path(name) / "config.json").is_file():  # perhaps of a whole dual encoder
            read_config(name, side).save_pretrained(out / folder)
    (out / "README.md").write_text(card(state, config, _results(checkpoint, state, which), which))


def _at_rest(config: Config) -> dict[str, Tensor]:
    """Weights of frozen towers that rested, and are in no checkpoint: they are what the run began from."""
    sides = sides_of(config.data)
    if not sides:
        return {}
    with torch.random.fork_rng(devices=[]):
        seed_everything(config.seed)
        state = model_of(config, load_tokenizer(config.data.tokenizer, config.data.context_length)).state_dict()
    towers = tuple(f"{side}_tower." for side in sides)
    return {name: value.contiguous() for name, value in state.items() if name.startswith(towers)}


def _results(checkpoint: Path, state: dict[str, Any], which: Which) -> dict[str, Any]:
    """What was measured of these weights: a run leaves evaluation.json of those that its last step has made."""
    file = checkpoint.parent.parent / "evaluation.json"
    ended = state["step"] >= state["total_steps"] and file.is_file()
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if ended else {}
    of_average = {name.removeprefix(MOMENTUM): value for name, value in found.items() if name.startswith(MOMENTUM)}
    return of_average if which == "momentum" else {n: v for n, v in found.items() if not n.startswith(MOMENTUM)}


def _tower(name: str) -> str:
    """A tower's name; of a folder of transformers its last part."""
    library, slash, rest = name.partition("/")
    return f"{library}{slash}{Path(rest).name}" if "/" in rest else name


def _settings(config: Config) -> str:
    """The keys of model.momentum that are not their defaults."""
    momentum = config.model.momentum
    given = {} if momentum is None else {"decay": momentum.decay, **momentum.model_dump(exclude_defaults=True)}
    return ", ".join(f"{key} {value}" for key, value in given.items())


def card(state: dict[str, Any], config: Config, results: dict[str, Any], which: Which = "weights") -> str:
    """What a reader of the folder needs to know."""
    shards = ", ".join(known_as(config.data.train))  # no paths of the machine that it was made on
    tokenizer = short_names([config.data.tokenizer])[config.data.tokenizer]
    size = config.data.image_size
    numbers = {name: float(value) for name, value in results.items() if isinstance(value, int | float)}
    heading = ["", "## Results", "", f"Measured in {config.execution.precision}.", ""]
    measured = [*heading, *in_words(numbers)] if numbers else []
    return "\n".join(
        [
            "# A dual encoder of images and texts",
            "",
            f"Trained with amclr_scale {state['packages'].get('amclr_scale', '')}: "
            f"objective {config.objective['name']}, global batch {config.train.global_batch_size}, "
            f"step {state['step']} of {state['total_steps']}, {state['samples']:,} samples seen "
            f"({state['samples'] / state['num_samples']:.2f} epochs of {state['num_samples']:,}).",
            "",
            f"- data: {shards} (fingerprint {state['data_fingerprint']})",
            *([f"- weights: their moving average ({_settings(config)})"] if which == "momentum" else []),
            f"- image tower: {_tower(config.model.image.name)}, {size} x {size} pixels",
            f"- text tower: {_tower(config.model.text.name)}, {config.data.context_length} tokens",
            f"- tokenizer: {tokenizer} (fingerprint {state.get('tokenizer_fingerprint', 'unknown')})",
            f"- embeddings: {config.model.embedding_width} wide, unit length",
            f"- recipe {state['recipe']}, saved {state['time']}; all keys are in config.yaml",
            "",
            "    import amclr_scale",
            "    model = amclr_scale.load('THIS FOLDER')",
            "    similarity = model.encode_image(['picture.png']) @ model.encode_text(['a caption']).T",
            *measured,
            "",
        ]
    )
