"""`model.init`: a whole dual encoder to start from, whatever library it is of. What it settles, and its weights.

    FOLDER or FOLDER/momentum.safetensors     a run or an export of ours
    transformers/FOLDER, or that folder       CLIP, SigLIP, Chinese-CLIP or VisionTextDualEncoder of transformers
    open_clip/ARCHITECTURE:FILE               one of open_clip's architectures with its weights, or OpenAI's own
    open_clip/FOLDER, or that folder          a model as open_clip saves and publishes it
    OWNER/NAME[@REVISION], hf-hub:..., ARCHITECTURE/TAG     one of these on the Hugging Face hub (start/hub_names.py)

First the recipe: every key that the model there settles is set, or, where the recipe says otherwise, refused by name.
Then, once the towers are built from those keys, all weights, each of which must be there. Only a model that is named
on the hub is downloaded.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amclr_scale.config.checks import check
from amclr_scale.config.schema import Config, Section
from amclr_scale.encoders.dual_encoder import LOG_SCALE_BOUNDS, DualEncoder
from amclr_scale.encoders.libraries.open_clip_towers import CONFIG
from amclr_scale.encoders.start import of_open_clip, of_runs, of_transformers
from amclr_scale.encoders.start.hub import fetch
from amclr_scale.encoders.start.hub_names import hint, parse, same_start
from amclr_scale.encoders.start.positions import fit_positions
from amclr_scale.errors import UserError

# Keys of which the recipe has the last word. The context may only become shorter.
FREE = (
    "model.temperature", "model.logit_bias", "model.image.options", "evaluation.resize", "data.context_length",
)  # fmt: skip
SIZE = "data.image_size"  # and of this, where towers are built for any: positions are then interpolated
# All that a model of any kind may settle.
SETTLED = (
    "model.embedding_width", "model.temperature", "model.logit_bias", "evaluation.resize",
    *(f"model.image.{name}" for name in ("name", "projection", "pretrained", "width", "depth", "norm", "options")),
    *(f"model.text.{name}" for name in ("name", "projection", "pretrained", "width", "layers", "heads", "pooling")),
    *(f"data.{name}" for name in ("tokenizer", "context_length", "image_size", "image_mean", "image_std")),
)  # fmt: skip
FILLED = "filled"  # among what is taken: whether captions always fill the context, so that it is fixed


class Kind(NamedTuple):
    """How models of one kind are read: the place -> keys of the recipe; the model's state -> that with the weights."""

    keys: Callable[[Path], dict[str, Any]]
    state: Callable[[Path, DualEncoder], dict[str, Tensor]]


KINDS: dict[str, Kind] = {
    "transformers": Kind(of_transformers.keys, of_transformers.state),
    "open_clip": Kind(of_open_clip.keys, of_open_clip.state),
    "ours": Kind(of_runs.keys, of_runs.state),
}


def _opened(init: str) -> tuple[Kind, Path]:
    """Which kind it is, and where it lies.

    Raises:
        UserError: none.
    """
    if (name := parse(init)) is not None:
        found = fetch(name, "model.init")
        return KINDS[found.library], found.place
    library, _, rest = init.partition("/")
    if library in ("transformers", "open_clip") and rest and not Path(init).exists():
        return KINDS[library], Path(rest).expanduser()
    path = Path(init).expanduser()
    if path.is_file() or (path / "config.yaml").is_file():
        return KINDS["ours"], path
    if (path / CONFIG).is_file():
        return KINDS["open_clip"], path
    if (path / "config.json").is_file():
        return KINDS["transformers"], path
    what = (
        f"{path} holds neither a config.yaml nor a config.json nor {CONFIG}" if path.exists() else "which is not there"
    )
    raise UserError(
        "model.init: expected a run or an export of ours, a local folder of transformers or open_clip, or "
        f"open_clip/ARCHITECTURE:FILE, or OWNER/NAME of the Hugging Face hub, got {init}: {what}{hint(init)}"
    )


def pinned(init: str) -> str:
    """A name of the hub with the commit that it is now, fetched; another one as it is.

    Raises:
        UserError: the hub has no such model, or is not reached.
    """
    name = parse(init)
    return init if name is None else str(fetch(name, "model.init").name)


def is_there(init: str) -> bool:
    """Whether anything is at the path that `model.init` names; a name of the hub is no path."""
    library, _, rest = init.partition("/")
    path = rest if library in KINDS else init
    return any(Path(one).expanduser().exists() for one in (init, path, path.partition(":")[2] or path))


def as_kept(config: Config, kept: Config) -> Config:
    """The recipe with what `model.init` has settled for a run that began from it; what the recipe says is left.

    Args:
        kept: that run's, resolved.
    """
    open_keys = [key for key in SETTLED if key.rpartition(".")[2] not in _section(config, key).model_fields_set]
    pins = ["model.init"] if same_start(str(kept.model.init), str(config.model.init)) else []  # at the run's commit
    return with_keys(config, {key: value_of(kept, key) for key in (*open_keys, *pins)})


def value_of(config: Config, key: str) -> Any:
    """What is under a dotted key."""
    return getattr(_section(config, key), key.rpartition(".")[2])


def _section(config: Config, key: str) -> Any:
    there: Any = config
    for section in key.split(".")[:-1]:
        there = getattr(there, section)
    return there


def resolve(config: Config, world_size: int = 1) -> Config:
    """The recipe with what `model.init` settles; without it, the recipe as it is.

    Raises:
        UserError: there is no such model, or keys of the recipe contradict it: one line for each.
    """
    if config.model.init is None:
        return config
    config = with_keys(config, {"model.init": pinned(config.model.init)})
    kind, path = _opened(str(config.model.init))
    taken = kind.keys(path)
    filled, lines = taken.pop(FILLED, False), []
    for key, value in taken.items():
        there, mine = _section(config, key), value_of(config, key)
        if key.rpartition(".")[2] not in there.model_fields_set or mine == value:
            continue
        sized = key == SIZE and kind is not KINDS["transformers"]
        if (key in FREE or sized) and not (key == "data.context_length" and (filled or mine > value)):
            taken[key] = mine
        else:
            lines.append(f"{key}: expected {value!r}, as in model.init ({path}), got {mine!r}; leave the key away")
    if config.model.image.weights is not None:
        lines.append("model.image.weights: expected null, as model.init brings all weights; leave one of them away")
    if lines:
        raise UserError("\n".join(lines))
    config = with_keys(config, taken)
    if wrong := check(config, world_size):
        raise UserError("\n".join(wrong))
    return config


def with_keys(config: Config, changes: dict[str, Any]) -> Config:
    """With values under dotted keys."""

    def changed(section: Section, prefix: str) -> Any:
        found: dict[str, Any] = {}
        for name in type(section).model_fields:
            key, value = f"{prefix}{name}", getattr(section, name)
            if key in changes:
                found[name] = changes[key]
            elif isinstance(value, Section) and any(each.startswith(f"{key}.") for each in changes):
                found[name] = changed(value, f"{key}.")
        return section.model_copy(update=found)

    made: Config = changed(config, "")
    return made


@torch.no_grad()
def load_start(model: DualEncoder, init: str) -> list[str]:
    """Copy all weights into a model that was built as `resolve` says. Returns what to tell about it.

    A scale and a bias that the recipe says otherwise are kept.

    Raises:
        UserError: the weights are not this model's, or some are missing.
    """
    kind, path = _opened(init)
    with torch.random.fork_rng(devices=[]):  # reading builds models: what is drawn after it stays the same
        state = kind.state(path, model)
    own = model.state_dict()
    notes = fit_positions(state, own)
    missing, foreign = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
    if missing or foreign or shapes:
        some = ", ".join(sorted([*missing, *foreign, *shapes])[:3])
        raise UserError(
            f"model.init: {path} does not hold this model's weights: {len(missing)} are missing, {len(foreign)} are "
            f"unknown, {len(shapes)} have another shape ({some}); build the model from the same folder"
        )
    kept = notes
    for name in ("logit_scale", "logit_bias"):
        if not torch.allclose(state[name], own[name], rtol=1e-5, atol=1e-5):
            kept.append(f"model.init: {name} {own[name].item():.6g} as the recipe says, {state[name].item():.6g} there")
            state[name] = own[name]
    model.load_state_dict(state)
    scale, bounds = model.logit_scale.exp().item(), [math.exp(bound) for bound in LOG_SCALE_BOUNDS]
    if not bounds[0] <= scale <= bounds[1] * (1 + 1e-5):
        kept.append(f"model.init: its scale of {scale:.6g} is brought into [1, 100] by the first step")
    numbers = sum(value.numel() for value in state.values())
    settled = (f"{key}={value}" for key, value in kind.keys(path).items() if key not in (FILLED, *FREE))
    where = path if parse(init) is None else init
    return [f"model.init: {numbers:,} weights from {where}, and " + ", ".join(settled), *kept]
