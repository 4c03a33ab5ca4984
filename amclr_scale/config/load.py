"""From a YAML file and `a.b=c` words to a checked `Config`: every mistake in one answer, the key first.

A file may name another one in `base:`, by its path from there or by a shipped one's name, and then holds differences
only. Imports no torch, so that a login node answers in milliseconds and no process group starts on a mistake.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from amclr_scale.addresses import refusals
from amclr_scale.config.checks import check
from amclr_scale.config.objective_options import option_models, outside
from amclr_scale.config.schema import Config
from amclr_scale.config.section import Section, section_of
from amclr_scale.config.shipped import find, find_from
from amclr_scale.config.source_files import NOT_OPTIONS, digest, source_of
from amclr_scale.config.yaml_text import Dumper, parse
from amclr_scale.errors import UserError, did_you_mean, nearest

RECIPE = ("seed", "data", "model", "objective", "optimizer", "train", "evaluation")
# Keys in those sections that say how fast or how long at a time, and change no result.
NEUTRAL = (
    "data.cache", "data.cache_gib", "data.max_shard_gib", "data.stream", "data.allow_pipe", "data.resident",
    "data.augment_on", "evaluation.batch_size", "train.max_hours",
    "objective.module",  # where the file lies; objective.module_sha256 says what is in it
)  # fmt: skip

# Keys that are younger than some recipes: at these values nothing is computed that those recipes did not say. (Nor does
# any key that is null by default count while it is.)
LATER: dict[str, Any] = {
    "data.image_negatives": 0, "data.image_negative": "neg.png", "objective.image_negatives": 0,
    "data.batches": "random", "data.max_image_mib": 1024, "data.text_negatives": 0,
    "data.text_negative": ["words", "attribute", "number"],
    "evaluation.evaluators": [], "evaluation.momentum": False, "evaluation.sheet": 0,
    "model.image.frozen": False, "model.image.unfrozen_norms": False, "model.image.frozen_head": False,
    "model.text.frozen": False, "model.text.unfrozen_norms": False, "model.text.frozen_head": False,
    "model.image.pretrained": False, "model.image.unfrozen_blocks": 0, "model.text.unfrozen_blocks": 0,
    "model.image.taps": [], "model.text.taps": [],
    "objective.log_alpha": 10.0, "objective.reference": False, "objective.batch_negatives": False,
    "objective.wait_epochs": 0.0, "objective.queue.wait_epochs": 0.0,
    "optimizer.layer_decay": 1.0, "optimizer.cooldown_samples": 0, "optimizer.cooldown_shape": "linear",
}  # fmt: skip
# The same of keys that other objectives' recipes have had before.
LATER_OF: dict[str, dict[str, Any]] = {"filip": {"objective.mask_duplicates": "none"}}


# Two ways of saying one thing: whichever is said last counts.
ALTERNATIVES = {"samples": "epochs", "epochs": "samples"}
# Names of the user's own, which replace those below as a list would.
WHOLE = ("data.train", "evaluation.splits", "evaluation.suites")


def merge(below: dict[str, Any], above: dict[str, Any], within: str = "") -> dict[str, Any]:
    """`above` over `below`, section by section. An objective whose name changes loses the old one's options.

    One of two alternatives replaces the other; null in its place says nothing and leaves it.

    Elsewhere a name changes alone: another optimizer keeps the learning rate, another run.name the folder. But
    `options` are of what the name beside them stands for, and go with it.
    """
    merged = {key: value for key, value in below.items() if above.get(ALTERNATIVES.get(key, "")) is None}
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and within + key not in WHOLE:
            if "name" in old and "name" in value and old["name"] != value["name"]:
                old = {} if key == "objective" else {name: kept for name, kept in old.items() if name != "options"}
            merged[key] = merge(old, value, f"{within}{key}.")
        else:
            merged[key] = value
    return merged


def _spelt_out(tree: dict[str, Any]) -> dict[str, Any]:
    """`execution: auto` in full, so that other keys of the section can stand beside it."""
    return {**tree, "execution": {"auto": True}} if tree.get("execution") == "auto" else tree


def read_file(path: Path, seen: tuple[Path, ...] = (), argument: str = "--config") -> dict[str, Any]:
    """The sections of a YAML file, laid over those of its `base`.

    Args:
        path: the file.
        seen: files that led here.
        argument: what the user gave it as.

    Raises:
        UserError: no such file, not readable, or a circle of bases.
    """
    if not path.is_file():
        raise UserError(
            f"{argument}: expected a YAML file or the name of a shipped one, got {path}, which "
            f"{'is no file' if path.exists() else 'does not exist'}"
        )
    if path.resolve() in seen:
        raise UserError(f"base: {path} names itself through {seen[-1]}")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{argument}: {path} cannot be read: {error}; expected YAML in UTF-8") from error
    tree = parse(text, str(path)) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections with keys, got {type(tree).__name__}")
    _module_beside(tree, path)
    base = tree.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"base: expected the path of a YAML file in {path}, got {base!r}")
    return (
        merge(read_file(find_from(path, base), (*seen, path.resolve()), "base"), _spelt_out(tree))
        if base
        else _spelt_out(tree)
    )


def _module_beside(tree: dict[str, Any], path: Path) -> None:
    """`objective.module` is a path from here, or else from the file that names it."""
    objective = tree.get("objective")
    module = objective.get("module") if isinstance(objective, dict) else None
    if isinstance(module, str) and not Path(module).expanduser().is_file() and (path.parent / module).is_file():
        tree["objective"] = {**tree["objective"], "module": str((path.parent / module).resolve())}


def from_words(words: Sequence[str]) -> dict[str, Any]:
    """Sections from `section.key=value` words; a later word wins.

    Raises:
        UserError: a word is no such pair, or its value is not readable.
    """
    tree: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            file = f"; a file is named by --config {word}" if word.endswith((".yaml", ".yml")) else ""
            raise UserError(f"{word}: expected key=value, such as train.global_batch_size=1024{file}")
        above: Any = parse(value, key, "; put text in quotes, inside the shell's own")
        for part in reversed(key.split(".")):
            above = {part: above}
        tree = merge(tree, _spelt_out(above))
    return tree


def _model_at(location: Sequence[Any], root: type[BaseModel]) -> type[BaseModel] | None:
    """The section that a location such as ("model", "image") or ("probes", 0) leads to."""
    found: Any = root
    for part in location:
        if isinstance(part, int):
            inside = [one for one in get_args(found) if isinstance(one, type) and issubclass(one, BaseModel)]
            found = inside[0] if inside else None
        elif isinstance(found, type) and issubclass(found, BaseModel):
            field = found.model_fields.get(part)
            found = (section_of(field.annotation) or field.annotation) if field else None
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the schema, dotted."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from all_keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _nearest(name: str, names: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    if near := did_you_mean(name, names):
        return near
    sections = dict.fromkeys(key[:at] for key in elsewhere for at, letter in enumerate(key) if letter == ".")
    near_ones = [key for key in (*elsewhere, *sections) if nearest(name, [key.rpartition(".")[2]], cutoff=0.8)]
    same_word = sorted(near_ones, key=lambda key: key.rpartition(".")[2] != name)  # a word that is right, first
    if same_word:
        return f"; did you mean {same_word[0]}?"
    return f"; known: {', '.join(names)}" if names and len(names) <= 40 else ""


def _explain(error: ErrorDetails, prefix: str, root: type[BaseModel]) -> str:
    """One line for one mistake."""
    # pydantic adds the branch of a union ("int", "literal['auto']") to the location: that is no key of ours
    location = [part for part in error["loc"] if not re.search(r"[\[\]()-]|^(int|float|str|bool)$", str(part))]
    key = prefix + ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        section = _model_at(location[:-1], root)
        names = list(section.model_fields) if section else []
        return f"{key}: no such key{_nearest(str(location[-1]), names, list(all_keys(root)) if not prefix else ())}"
    if error["type"] == "missing":
        return f"{key}: this key is needed, and there is none"
    message = error["msg"].replace("Input should be", "expected").replace("Value error, ", "")
    message = "expected true or false" if error["type"].startswith("bool_") else message
    message = re.sub(r"^String should match pattern '\^(\[.*\])\+\$'$", r"expected characters of \1 alone", message)
    message = re.sub(r"^\w+ should have at (\w+ \d+ \w+).*", r"expected at \1", message)
    got = error["input"]
    message, semicolon, fix = message.partition("; ")  # a hint comes last
    fix = semicolon + fix
    if error["type"] == "literal_error":
        fix = did_you_mean(str(got), re.findall(r"'([^']+)'", message))
    if isinstance(got, int | float) and error["type"] == "string_type":
        fix = f"; put it in quotes where it is a name (as a word of a command line: {key}='\"...\"')"
    if error["type"] in ("dict_type", "model_type"):
        names = [one for one in (got if isinstance(got, list | tuple) else [got]) if isinstance(one, str)]
        message, fix = "expected names with values", f"; such as {key}={{{(names or ['NAME'])[0]}: VALUE}}"
        if error["type"] == "model_type":  # whose names are those of its keys
            section = _model_at(location, root)
            named = isinstance(got, str) and section is not None and "name" in section.model_fields
            fix = f"; did you mean {key}.name={got}?" if named else f"; such as {key}={{KEY: VALUE}}"
    if isinstance(got, str) and error["type"] == "list_type":
        fix = f"; put it in brackets: {key}=[{got}]"
    return f"{key}: {message}, got {_in_yaml(got)}{fix}"


def _in_yaml(value: Any) -> str:
    """As a user writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value)


def mistakes(error: ValidationError, prefix: str = "", root: type[BaseModel] = Config) -> list[str]:
    """One line per key that is wrong.

    Args:
        error: what pydantic found.
        prefix: of the keys, such as "objective.".
        root: the model that was validated.
    """
    lines: dict[str, str] = {}
    for detail in error.errors():
        line = _explain(detail, prefix, root)
        key = line.partition(":")[0]
        if "put it in brackets" in lines.get(key, ""):
            continue  # what else it might be helps nobody
        lines[key] = f"{lines[key].rpartition(', got ')[0]}, or {line.partition(': ')[2]}" if key in lines else line
    return list(lines.values())


def _check_objective(objective: Any) -> tuple[dict[str, Any], list[str]]:
    """The objective's section with its defaults filled in, and what is wrong with it."""
    if not isinstance(objective, dict) or not isinstance(objective.get("name"), str):
        beside = f" beside objective.{next(iter(objective))}" if isinstance(objective, dict) and objective else ""
        return {}, [f"objective.name: this key is needed{beside}, such as objective.name=clip"]
    which, models = {"name": objective["name"]}, option_models()
    if objective.get("module") is not None:
        try:
            file = Path(str(objective["module"])).expanduser().resolve()
            models = {name: source.options for name, source in outside(file).items()}
            which |= {"module": str(file), "module_sha256": digest(source_of(file))}
        except UserError as error:
            return {}, [str(error)]
    if which["name"] not in models:
        where = f" in {which['module']}" if "module" in which else ""
        return {}, [
            f"objective.name: no such objective '{which['name']}'{where}{_nearest(which['name'], list(models))}"
        ]
    options = {key: value for key, value in objective.items() if key not in NOT_OPTIONS}
    model = models[which["name"]]
    try:
        return {**which, **model(**options).model_dump()}, []
    except ValidationError as error:
        return {}, mistakes(error, "objective.", model)


def _own_options(config: Config) -> tuple[Config, list[str]]:
    """With the defaults of the optimizer's own options filled in, and what is wrong with those given."""
    optimizer = config.optimizer
    model, given = optimizer.rule.options or Section, optimizer.options
    if optimizer.rule.options is None and given:
        return config, [f"optimizer.options.{next(iter(given))}: {optimizer.name} has no options of its own"]
    try:
        options = model(**given).model_dump(mode="json")
    except ValidationError as error:
        return config, mistakes(error, "optimizer.options.", model)
    return config.model_copy(update={"optimizer": optimizer.model_copy(update={"options": options})}), []


def build(tree: dict[str, Any], world_size: int = 1, *, trusted: bool = True) -> Config:
    """Check a tree of sections and fill in the defaults.

    Args:
        trusted: False for a folder that is only opened, perhaps from elsewhere: whether its objective could be trained
            is not asked, and an `objective.module` is taken as it stands, for what it declares is code.

    Raises:
        UserError: one line per mistake, all of them.
    """
    given = tree.get("objective", {"name": "clip"})
    closed = not trusted and isinstance(given, dict) and given.get("module") is not None
    objective, lines = (given, []) if closed else _check_objective(given)
    try:
        config = Config.model_validate({**tree, "objective": objective})
    except ValidationError as error:
        raise UserError("\n".join(mistakes(error) + lines)) from error
    config, wrong = _own_options(config)
    lines += [*wrong, *(refusals(tree) if trusted else ())]
    try:
        lines += check(config, world_size, objective=trusted and not lines)
    except UserError as error:  # of what the objective declares
        lines.append(str(error))
    if lines:
        raise UserError("\n".join(lines))
    return config


def load(path: str | Path | None, words: Sequence[str] = (), world_size: int = 1, *, trusted: bool = True) -> Config:
    """Read a configuration file, put the words over it, check everything.

    Args:
        path: YAML file, or the name of a shipped one; None: the schema's defaults.
        words: `section.key=value`, YAML on the right of the sign.
        world_size: number of ranks, for the checks that depend on it.
        trusted: see `build`.

    Raises:
        UserError: one line per mistake, all of them, the key first.
    """
    return build(merge(read_file(find(path)) if path else {}, from_words(words)), world_size, trusted=trusted)


def dump(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one."""
    tree = config.model_dump(mode="json")
    return str(yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=110, allow_unicode=True))


def keys_of(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of nested sections, dotted, with their values."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def recipe(config: Config) -> dict[str, Any]:
    """The keys that decide what is computed, dotted, with their values."""
    tree = config.model_dump(mode="json")
    chosen = keys_of({section: tree[section] for section in RECIPE})
    later = LATER | LATER_OF.get(str(tree["objective"].get("name")), {})
    return {key: value for key, value in chosen if key not in NEUTRAL and later.get(key) != value}


def recipe_hash(config: Config) -> str:
    """12 hex digits that change whenever a key of the recipe does, and never with `execution` or `run`."""
    return hashlib.sha256(json.dumps(recipe(config), sort_keys=True).encode()).hexdigest()[:12]
