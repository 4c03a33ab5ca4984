"""A run that is resumed needs nothing that it began from: weights are the checkpoint's, and the rest is in its folder.

Where `model.init`, the folder of a tower or the tokenizer's file is not there any more (it was moved, or the run goes
on elsewhere), the run's own copies stand for it: tokenizer/, image_tower/, text_tower/, and the keys in config.yaml.
"""

from collections.abc import Iterator
from pathlib import Path

from amclr_scale.checkpoint.cached import kept_records
from amclr_scale.checkpoint.fetch import source_of
from amclr_scale.checkpoint.files import BEST, CHECKPOINTS, LATEST, newest_named
from amclr_scale.checkpoint.remote import RemoteError
from amclr_scale.config.load import load, recipe
from amclr_scale.config.schema import Config
from amclr_scale.encoders.start.hub_names import same_start
from amclr_scale.encoders.start.taken import as_kept, is_there, resolve, value_of, with_keys
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import with_own_files

CONFIG = "config.yaml"


def settled(config: Config, world_size: int) -> Config:
    """The recipe with what `model.init` settles; in a run that goes on, with its own copies of what is gone.

    Raises:
        UserError: there is no such model, or keys contradict it.
    """
    gone = _gone(config)
    for folder in _runs(config) if gone and config.resume != "never" else ():
        if not (folder / CONFIG).is_file():
            continue
        kept = load(folder / CONFIG, trusted=False)
        if all(_began_from(kept, config, key, folder) for key in gone):
            made = as_kept(config, kept) if "model.init" in gone else resolve(config, world_size)
            if config.resume == "auto" and not config.run.name and recipe(made) != recipe(kept):
                continue  # another run
            own, absent = with_own_files(made, folder), [key for key in _gone(made) if key != "model.init"]
            made = with_keys(made, {key: value_of(own, key) for key in absent})
            return made.model_copy(update={"resume_changed": [*config.resume_changed, *absent]})
    return resolve(config, world_size)


def _began_from(kept: Config, config: Config, key: str, folder: Path) -> bool:
    """Whether a run has what is gone now, or its own copy of it."""
    before = value_of(kept, key)
    if key == "model.init" and same_start(str(before), str(value_of(config, key))):
        return True
    return bool(before == value_of(config, key) or str(folder) in str(before))


def _gone(config: Config) -> list[str]:
    """Keys that name a path where nothing is."""
    model = config.model
    found = [] if model.init is None or is_there(model.init) else ["model.init"]
    for key, name in (("model.image.name", model.image.name), ("model.text.name", model.text.name)):
        library, _, rest = name.partition("/")
        if library in ("transformers", "open_clip") and "/" in rest and not Path(rest).expanduser().exists():
            found.append(key)
    if "/" in config.data.tokenizer and not Path(config.data.tokenizer).expanduser().exists():
        found.append("data.tokenizer")
    return found


def _runs(config: Config) -> Iterator[Path]:
    """The folders of runs that it may go on from, the likeliest first; of a run in a store its records in the cache."""
    home = Path(config.run.folder)
    try:
        source = source_of(config, home / (config.run.name or ""), newest_named)  # on every rank
        if source is not None:
            yield kept_records(source.remote)
    except RemoteError as error:
        raise UserError(f"resume: {error}") from error
    if config.resume != "auto":
        path = Path(config.resume).expanduser()
        path = path.parent if path.name.startswith("step_") or path.name in (LATEST, BEST) else path
        yield path.parent if path.name == CHECKPOINTS else path
    elif config.run.name:
        yield home / config.run.name
    else:
        pointers = home.glob(f"*/{CHECKPOINTS}/{LATEST}")
        yield from (one.parent.parent for one in sorted(pointers, key=lambda one: -one.stat().st_mtime))
