"""A model of the Hugging Face hub brought into huggingface_hub's own cache, once per machine, at one commit of it.

What the cache has whole of a commit is taken from there and nobody is asked. Otherwise the hub says which commit a
branch is and which files that has; those that the model's library reads are fetched, weights last, so that where they
are whole the rest is there too. One process fetches, the others of the machine wait for it. The hub's own ways count:
HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_ETAG_TIMEOUT. Python files are never fetched.
"""

import contextlib
import importlib
import inspect
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from amclr_scale.distributed import preparing
from amclr_scale.encoders.libraries.open_clip_towers import CONFIG
from amclr_scale.encoders.start.hub_names import COMMIT, HubName, published
from amclr_scale.encoders.start.of_open_clip import FILES
from amclr_scale.errors import UserError

log = logging.getLogger(__name__)
_OURS = ("config.yaml", "weights.safetensors")
_BESIDE = ("tokenizer/", "image_tower/", "text_tower/")  # in a run or an export of ours
_SMALL = (".json", ".txt", ".model")  # of transformers: configurations, vocabularies
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Fetched(NamedTuple):
    """A model of the hub on the disk."""

    name: HubName  # with its commit
    library: str  # whose files they are: ours, open_clip or transformers
    place: Path  # as that library's models are named


class _Wanted(NamedTuple):
    """Where a name leads: the repository, the one file that is meant (None: all that the model has), its library."""

    repository: str
    file: str | None
    library: str


def fetch(name: HubName, key: str) -> Fetched:
    """The model on the disk, fetched if it is not in the cache.

    Args:
        key: what the name was given as, for messages.

    Raises:
        UserError: there is no such model, it may not be seen, the hub is not reached, or it holds no such model.
    """
    pair = published(name, key)
    wanted = _Wanted(*pair, "open_clip") if pair else _Wanted(name.name, None, name.library)
    here = _cached(wanted, name.commit) if name.commit else None
    if here is None:
        here, name = _asked(wanted, name, key)
    library, folder, names = here
    if pair:
        return Fetched(name, library, Path(f"{name.name}:{folder / names[-1]}"))
    return Fetched(name, library, folder)


_Here = tuple[str, Path, list[str]]  # library, folder of the commit, files


def _asked(wanted: _Wanted, name: HubName, key: str) -> tuple[_Here, HubName]:
    """What the hub has; where it is not reached, what the cache has of the revision."""
    hub = _package(key)
    seconds = importlib.import_module("huggingface_hub.constants").HF_HUB_ETAG_TIMEOUT
    try:
        info = hub.HfApi().model_info(wanted.repository, revision=name.revision or None, timeout=seconds)
        if not COMMIT.fullmatch(str(info.sha)):
            raise ValueError(f"expected a commit of 40 hexadecimal digits, got {info.sha!r:.80}")
        name = name.at(str(info.sha))
    except Exception as error:  # the library raises many kinds, and its own libraries more
        if _answers(error):
            raise UserError(_in_words(error, wanted, name, key)) from error
        commit = name.commit or _reference(wanted, name).strip()
        here = _cached(wanted, commit) if commit else None
        if here is None:
            raise UserError(_in_words(error, wanted, name, key)) from error
        log.warning("%s: %s is %s here, as it was fetched before: %s", key, name, commit, _first(error))
        return here, name.at(commit)
    files = [one.rfilename for one in info.siblings or []]
    found = _chosen(wanted, files)
    if found is None:
        raise UserError(
            f"{key}: expected {_kinds(wanted)} with weights, got {wanted.repository}, which holds "
            f"{', '.join(sorted(files)[:8]) or 'nothing'}"
        )
    with _alone(wanted, name.commit, key):
        if (here := _cached(wanted, name.commit)) is None:
            here = _download(hub, wanted, name, *found, key)
    return here, name


def _download(hub: Any, wanted: _Wanted, name: HubName, library: str, names: list[str], key: str) -> _Here:
    print(f"{key}: fetching {wanted.repository}@{name.commit}, {len(names)} files", flush=True)
    place = ""
    shown = {"tqdm_class": _bar()} if "tqdm_class" in inspect.signature(hub.hf_hub_download).parameters else {}
    try:
        for one in names:
            place = hub.hf_hub_download(wanted.repository, one, revision=name.commit, **shown)
        reference = _folder(wanted) / "refs" / (name.asked or "main")
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(name.commit)  # so that it is known without the hub too
    except Exception as error:
        raise UserError(_in_words(error, wanted, name, key, fetching=True)) from error
    return library, Path(place.removesuffix(names[-1])), names


def _cached(wanted: _Wanted, commit: str) -> _Here | None:
    """What the cache has of a commit; None: not all of it."""
    folder = _folder(wanted) / "snapshots" / commit
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    found = _chosen(wanted, files)
    if found is None:
        return None
    library, names = found
    for index in [one for one in names if one.endswith(".index.json")]:
        try:
            parts = set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        if not parts <= set(files):
            return None
    if library == "transformers":
        reads = {"preprocessor_config.json", "processor_config.json"} & set(files)
        if not reads or not any("vocab" in one or "tokenizer" in one or one.endswith(".model") for one in files):
            return None
    return library, folder, names


def _chosen(wanted: _Wanted, files: Iterable[str]) -> tuple[str, list[str]] | None:
    """Whose model a repository's files are, and which of them it needs, weights last; None: it is no such model."""
    there = sorted(set(files))
    if wanted.file is not None:
        meant = next((one for one in ([wanted.file] if wanted.file else FILES) if one in there), None)
        return None if meant is None else ("open_clip", [meant])
    if not wanted.library and set(_OURS) <= set(there):
        beside = [one for one in there if one.startswith(_BESIDE) and not one.endswith(".py")]
        return "ours", [*beside, *_OURS]
    if wanted.library != "transformers" and CONFIG in there and (file := next((f for f in FILES if f in there), "")):
        return "open_clip", [CONFIG, file]
    form = next((one for one in _WEIGHTS if one in there), None)
    if wanted.library == "open_clip" or "config.json" not in there or form is None:
        return None
    suffix = form.removesuffix(".index.json").rpartition(".")[2]
    weights = [one for one in there if (match := _SHARD.fullmatch(one)) and match[2] == suffix]
    weights = weights if form.endswith(".index.json") else [form]
    small = [one for one in there if "/" not in one and one.endswith(_SMALL) and not one.endswith(".index.json")]
    return "transformers", [*small, *([form] if form.endswith(".index.json") else []), *weights]


def _kinds(wanted: _Wanted) -> str:
    if wanted.file is not None:
        return wanted.file or " or ".join(FILES)
    named = {"transformers": "config.json of transformers", "open_clip": CONFIG}
    return named.get(wanted.library) or f"{_OURS[0]} of a run of ours, {CONFIG}, or {named['transformers']}"


def _package(key: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(f"{key}: a name of the hub needs huggingface_hub: pip install huggingface_hub") from error


def _folder(wanted: _Wanted) -> Path:
    """The repository's place in the cache."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    return Path(constants.HF_HUB_CACHE) / f"models--{wanted.repository.replace('/', '--')}"


def _reference(wanted: _Wanted, name: HubName) -> str:
    """The commit that a revision was when it was last fetched; "": it was not."""
    file = _folder(wanted) / "refs" / (name.asked or "main")
    if file.is_file():
        return file.read_text("utf-8")
    known = [path.name for path in (_folder(wanted) / "snapshots").glob(f"{name.asked}*")] if name.asked else []
    return known[0] if len(known) == 1 else ""


@contextlib.contextmanager
def _alone(wanted: _Wanted, commit: str, key: str) -> Iterator[None]:
    """Only one process of the machine fetches a repository; where the cache has it already nobody waits."""
    if _cached(wanted, commit) is not None:
        yield
        return
    folder = _folder(wanted)
    lock = folder.parent / ".locks" / folder.name / "amclr_scale.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{key}: {folder.parent}, the cache of the hub, cannot be written ({error.strerror}); set HF_HOME"
        ) from error
    with importlib.import_module("huggingface_hub.utils").WeakFileLock(lock):
        yield


def _bar() -> Any:
    """A progress bar that also tells the ranks that wait; a terminal alone shows it."""
    base: Any = importlib.import_module("huggingface_hub.utils").tqdm

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **named: Any):
            super().__init__(*args, **{**named, "disable": named.get("disable") or not sys.stderr.isatty()})

        def update(self, n: float | None = 1) -> Any:
            preparing.advance("bytes fetched", int(n or 0))
            return super().update(n)

    return Bar


def _answers(error: Exception) -> bool:
    """Whether the hub has spoken: it is there, and says no, for good."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is not None and status < 500 and status not in (408, 429)


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _in_words(error: Exception, wanted: _Wanted, name: HubName, key: str, *, fetching: bool = False) -> str:
    """What is wrong, the fix, and the way without the hub."""
    errors: Any = importlib.import_module("huggingface_hub.errors")
    hub: Any = importlib.import_module("huggingface_hub.constants")
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "log in by `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        why = f"its owner lets in whom he knows: ask at {hub.ENDPOINT}/{wanted.repository}, and {login}"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"it has no revision {name.revision}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = f"neither a folder here nor a model of {hub.ENDPOINT}, or a private one: check the name, or {login}"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set, and the cache has not all of it"
    elif status in (401, 403):
        why = f"the hub answers {status} ({_first(error)}): {login}"
    elif status is not None:
        why = f"the hub answers {status}: {_first(error)}"
    elif fetching:
        why = f"it was not fetched to its end ({_first(error)}): the same command goes on with what is missing"
    else:
        why = f"no folder here, the cache has not all of it, and {hub.ENDPOINT} was not reached: {_first(error)}"
    return (
        f"{key}: {name}: {why}. Without the hub: hf download {wanted.repository} --local-dir FOLDER where it is "
        f"reached, and {key}=FOLDER here"
    )
