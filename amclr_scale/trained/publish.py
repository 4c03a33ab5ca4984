"""A trained model as a repository of the Hugging Face hub: an export, its card with what the hub reads, in one commit.

Through huggingface_hub, with its token, its address (HF_ENDPOINT) and its way of uploading large files.
"""

import importlib
import os
import re
import shutil
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclr_scale.errors import UserError
from amclr_scale.trained.export import Which, export

CARD, WEIGHTS = "README.md", "weights.safetensors"
MEASURED = "evaluation"  # where `evaluate EXPORT` leaves results
HERE = "'THIS FOLDER'"  # in a card, where a repository stands for the folder


@dataclass(frozen=True)
class Published:
    """What went where."""

    url: str  # of the commit
    files: dict[str, int]  # by name, with their bytes
    made: bool  # whether the repository is new


def check_name(repository: str) -> None:
    """Refuse what can be no repository.

    Raises:
        UserError: or huggingface_hub is not installed.
    """
    try:
        importlib.import_module("huggingface_hub.utils").validate_repo_id(repository)
        if "/" not in repository:
            raise ValueError("whose it is comes first")
    except ImportError as error:
        raise UserError(f"--push: needs huggingface_hub: pip install huggingface_hub ({error})") from error
    except ValueError as error:
        raise UserError(f"--push: expected OWNER/NAME, got {repository}: {error}") from error


@dataclass(frozen=True)
class Stays:
    """What of an export's folder is not for others to see, by name.

    Attributes:
        hidden: hidden files and folders.
        measured: results that `evaluate EXPORT` left, of data and by names of this machine, which the card says nothing
            of. Results that the card names, a picture that it shows for instance, are for others.
    """

    hidden: list[str]
    measured: list[str]


def prepare(source: str, out: Path, repository: str, further: Callable[[Path], None] | None, which: Which) -> Stays:
    """Write the files of the repository into a new folder: of an export those there, of anything else an export.

    Args:
        source: a run, a checkpoint or an address of one, or a folder that `export` wrote.
        further: writes more into an export, such as another library's files.

    Returns:
        What of an export stays where it is.

    Raises:
        UserError: there is no model, or it has links that lead out of its folder.
    """
    folder, hidden, measured = Path(source).expanduser(), list[str](), list[str]()
    if (folder / WEIGHTS).is_file() and (folder / CARD).is_file():
        if further is not None or which != "weights":
            raise UserError(f"--to, --which: {source} is an export already; leave them away, or name the run")
        names, hidden = own_files(folder)
        words = (folder / CARD).read_text("utf-8")
        measured = [name for name in names if name.startswith(f"{MEASURED}/") and not _names(words, name)]
        for name in names:
            if name in measured:
                continue
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / name)
    else:
        export(source, out, further, which)
    card = out / CARD
    card.write_text(_for_the_hub(card.read_text("utf-8"), repository, (out / "config.json").is_file()), "utf-8")
    return Stays(hidden, measured)


def _names(card: str, name: str) -> bool:
    """Whether a card names a file, as it is or as in an address: no longer name, and none in another folder."""
    written = "|".join(re.escape(one) for one in (name, urllib.parse.quote(name)))
    before = r"(?<![\w./%-])(?:\./|https?://\S+?/(?:resolve|blob|raw)/\w+/)?"
    return re.search(rf"{before}(?:{written})(?![\w/-]|\.\w)", card) is not None


def own_files(folder: Path) -> tuple[list[str], list[str]]:
    """The files of a folder that others may see, by name, and what is hidden in it: `.env`, `.git`.

    Raises:
        UserError: it has links that lead out of it, or not to files.
    """
    home, names, hidden, links = folder.resolve(), list[str](), list[str](), list[str]()
    for place, folders, files in os.walk(folder):  # goes into no link
        here = Path(place)
        shown = {one for one in (*folders, *files) if not one.startswith(".")}
        hidden += [(here / one).relative_to(folder).as_posix() for one in {*folders, *files} - shown]
        folders[:] = sorted(shown.intersection(folders))
        for link in filter(Path.is_symlink, (here / one for one in shown)):
            links += [] if link.is_file() and link.resolve().is_relative_to(home) else [str(link)]
        names += [(here / one).relative_to(folder).as_posix() for one in files if one in shown]
    if links:
        some = ", ".join(sorted(links)[:3]) + ", ..." * (len(links) > 3)
        raise UserError(
            f"--push: expected files, got links to folders, to nothing, or out of {folder}: {some}; remove them, or "
            "put what is meant in their place"
        )
    return sorted(name for name in names if (folder / name).is_file()), sorted(hidden)


def _for_the_hub(card: str, repository: str, transformers: bool) -> str:
    """A card with the lines that the hub sorts by, and the repository where the folder was. No licence is guessed."""
    if card.startswith("---\n"):
        return card
    lines = ["---", "library_name: amclr_scale", "pipeline_tag: zero-shot-image-classification", "tags:"]
    tags = ["clip", "contrastive-learning", "image-text-retrieval", *(["transformers"] if transformers else [])]
    head = "\n".join([*lines, *(f"- {tag}" for tag in tags), "---", "", ""])
    fetched = f"snapshot_download({repository!r})"
    imports = "    import amclr_scale\n"
    card = card.replace(imports, f"{imports}    from huggingface_hub import snapshot_download\n")
    return head + card.replace(HERE, fetched)


def files_of(folder: Path) -> dict[str, int]:
    """What would go into the repository, by name, with bytes."""
    return {name: (folder / name).stat().st_size for name in own_files(folder)[0]}


def publish(folder: Path, repository: str, *, public: bool = False) -> Published:
    """Put a folder's files into a repository, which is made, private, where there is none: one commit, all or nothing.

    Other files that are in the repository stay, and so does who can see it.

    Raises:
        UserError: there is no token, it may not, the hub is not to be reached, or it refuses the files.
    """
    hub: Any = importlib.import_module("huggingface_hub")
    files = files_of(folder)
    try:
        api = hub.HfApi()
        made = not api.repo_exists(repository)
        if made:
            api.create_repo(repository, private=not public, exist_ok=True)
        adds = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in files]
        done = api.create_commit(repository, adds, commit_message="A model of amclr_scale")
    except Exception as error:  # the library raises many kinds, and its own libraries more
        raise UserError(f"{repository} cannot be published: {_why(error)}") from error
    return Published(str(done.commit_url), files, made)


def _why(error: Exception) -> str:
    errors: Any = importlib.import_module("huggingface_hub.errors")
    first = str(error).strip().partition("\n")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no token here; log in by `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it where the hub can be reached"
    if status == 401:
        return f"the hub does not know the token ({first}); log in by `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token may not write there ({first}); make one with the right to write, or choose a name of yours"
    if status is not None:
        return f"the hub answers {status}: {first}"
    return f"the hub was not reached: {first or type(error).__name__}"
