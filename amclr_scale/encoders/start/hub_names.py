"""Names of models on the Hugging Face hub, as users of transformers and of open_clip write them.

    OWNER/NAME, hf-hub:OWNER/NAME             a repository, of transformers, of open_clip, or of a run or export of ours
    transformers/OWNER/NAME, open_clip/...    its files of that library
    ARCHITECTURE/TAG, open_clip/...           weights that open_clip publishes for one of its architectures
    ...@REVISION                              a branch, a tag or a commit of the repository; without it its main branch
    ...@COMMIT, ...@REVISION@COMMIT           as a run keeps it: what was asked for, and the commit that this was

What is there on the disk is a path and no such name.
"""

import importlib.util
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from amclr_scale.errors import UserError, did_you_mean, one_of
from amclr_scale.torchvision_ops import import_torchvision

_NAME = re.compile(
    r"(?P<library>(transformers|open_clip)/)?(?P<hub>hf-hub:)?(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>\w[\w./@-]*))?"
)
_LINK = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co|hf:/)/(models/)?(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".yaml", ".yml", ".json")  # a path to one is no repository


@dataclass(frozen=True)
class HubName:
    """A name in its parts.

    Attributes:
        library: whose files are meant: transformers, open_clip, or whichever there are.
        before: what stands before the name, as it was written.
        name: OWNER/NAME or ARCHITECTURE/TAG.
        asked: the revision that was asked for; "": the main branch, or the commit itself.
        commit: 40 hex digits; "": not known yet.
    """

    library: str
    before: str
    name: str
    asked: str = ""
    commit: str = ""

    def __str__(self) -> str:
        return "@".join([self.before + self.name, *(part for part in (self.asked, self.commit) if part)])

    @property
    def revision(self) -> str:
        """The most precise that is known of it; "": the main branch."""
        return self.commit or self.asked

    def at(self, commit: str) -> "HubName":
        """The same, with the commit that it is."""
        return replace(self, asked="" if commit.startswith(self.asked) else self.asked, commit=commit)


def parse(init: str) -> HubName | None:
    """A name of the hub in its parts; None: it has not the form of one, or names what is on the disk."""
    found = _NAME.fullmatch(init)
    if found is None or ".." in init or found["name"].startswith(("transformers/", "open_clip/")):
        return None
    name, library = found["name"], (found["library"] or "").rstrip("/")
    if not found["hub"]:
        home = Path(name.partition("/")[0])
        if Path(init).exists() or Path(name).exists() or home.is_dir() or name.endswith(_FILES):
            return None
    asked, commit = found["revision"] or "", ""
    before, at, last = asked.rpartition("@")
    if COMMIT.fullmatch(last):
        asked, commit = before if at else "", last
    return HubName(library, (found["library"] or "") + (found["hub"] or ""), name, asked, commit)


def hint(name: str) -> str:
    """What may be meant by a name, for the end of a message about what is not there; "": nothing is near."""
    if link := _LINK.match(name):
        return f"; a model of the hub is named {link['name']}"
    owner, _, rest = name.partition("/")
    if not Path(owner).is_dir() or Path(name).exists() or name.endswith(_FILES) or parse(f"hf-hub:{name}") is None:
        return ""
    return did_you_mean(rest, os.listdir(owner)) or f"; if a model of the hub is meant: hf-hub:{name}"


def same_start(kept: str, init: str) -> bool:
    """Whether a run that began from `kept` began from what `init` names: where it says no revision, from any."""
    before, now = parse(kept), parse(init)
    if before is None or now is None or (before.library, before.name) != (now.library, now.name):
        return False
    if now.commit:
        return now.commit == before.commit
    return now.asked in ("", before.asked) or before.commit.startswith(now.asked)


def _architectures() -> set[str]:
    """The names of open_clip's architectures, without the seconds that its import takes."""
    if "open_clip" in sys.modules:
        return set(sys.modules["open_clip"].list_models())
    found = importlib.util.find_spec("open_clip")
    places = (found.submodule_search_locations if found else None) or []
    return {path.stem for place in places for path in Path(place, "model_configs").glob("*.json")}


def published(name: HubName, key: str) -> tuple[str, str] | None:
    """The repository and the file in it ("": whichever there is) of ARCHITECTURE/TAG; None: no such architecture.

    Raises:
        UserError: the architecture has no such tag, or its weights are not on the hub, or want another activation.
    """
    architecture, _, tag = name.name.partition("/")
    if name.library == "transformers" or "hf-hub:" in name.before or architecture not in _architectures():
        return None
    import_torchvision()
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        known = one_of(tags) if tags else "none"
        raise UserError(f"{key}: expected weights of {architecture} that open_clip knows ({known}), got {tag}"
                        f"{did_you_mean(tag, tags)}")  # fmt: skip
    found = open_clip.get_pretrained_cfg(architecture, tag)
    quick = bool((open_clip.get_model_config(architecture) or {}).get("quick_gelu"))
    if quick != bool(found.get("quick_gelu")):
        other = architecture.removesuffix("-quickgelu") if quick else f"{architecture}-quickgelu"
        raise UserError(
            f"{key}: the weights {tag} were trained with {'GELU' if quick else 'QuickGELU'}: expected such as "
            f"{other}/{tag}, got {architecture}/{tag}"
        )
    if not found.get("hf_hub"):
        raise UserError(
            f"{key}: {architecture}/{tag} is not on the hub but at {found.get('url')}: fetch that file, and name it "
            f"open_clip/{architecture}/{tag}:FILE"
        )
    owner, repository, *file = found["hf_hub"].split("/")
    return f"{owner}/{repository}", "/".join(file)
