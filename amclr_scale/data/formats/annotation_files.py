"""The JSON annotation files of the field, one reader each, for making shards and for evaluation alike.

    list        [{"image", "caption": one or several, "image_id"?, "negatives"?}]: SogCLR, iSogCLR, AmCLR, ALBEF
    coco        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}: captions_val2017.json
    karpathy    {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}: dataset_coco.json

Karpathy & Fei-Fei, CVPR 2015, arXiv:1412.2306. A caption is a string with something in it. What else stands in its
place (null, blanks, a number) is left out and named in `Entry.left_out`; it never becomes a text.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from amclr_scale.errors import UserError

Kind = Literal["list", "coco", "karpathy"]


@dataclass(frozen=True)
class Entry:
    """One image of an annotation file."""

    number: int  # in the file, from 0
    image: str | None  # path, with forward slashes; None: the entry names none
    captions: tuple[str, ...]
    left_out: tuple[str, ...] = ()  # what stood in a caption's place, in words
    image_id: str | int | None = None
    split: str | None = None
    negatives: dict[str, tuple[str, ...]] = field(default_factory=dict)  # wrong captions by what is wrong with them
    words: str = ""  # the entry itself, in short


def read_json(file: Path, where: str) -> Any:
    """The content of a JSON file; of JSON lines (an object on each) a list.

    Args:
        where: what the user gave the file as, for the message.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {file} cannot be read: {error}; expected JSON in UTF-8") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if file.suffix.lower() in (".jsonl", ".ndjson") or (len(lines) > 1 and _is_object(lines[0][1])):
        return [_json_line(line, f"{where}: {file}, line {number:,}") for number, line in lines]
    try:
        return json.loads(text)
    except ValueError as error:
        hint = "; in JSON a backslash is written twice, or use / in paths" if "escape" in str(error) else ""
        raise UserError(f"{where}: {file}: expected JSON, got {error}{hint}") from error


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _json_line(words: str, where: str) -> Any:
    try:
        return json.loads(words)
    except ValueError as error:
        raise UserError(f"{where}: expected a JSON object, got {error}") from error


def kind_of(content: Any, where: str) -> Kind:
    """Which of the formats a content is.

    Raises:
        UserError: none of them.
    """
    if isinstance(content, list):
        return "list"
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return "coco" if isinstance(content.get("annotations"), list) else "karpathy"
    raise UserError(
        f"{where}: expected a list of {{image, caption}}, COCO's {{images, annotations}} or Karpathy's {{images}}, got "
        f"{short(content)}"
    )


def entries(content: Any, kind: Kind, where: str) -> Iterator[Entry]:
    """The images of an annotation file, in its order.

    Raises:
        UserError: the content is not of that kind.
    """
    found = kind_of(content, f"{where}: expected {_WORDS[kind]}; it is none of what is known")
    if found != kind:
        raise UserError(f"{where}: expected {_WORDS[kind]}, got {_WORDS[found]}")
    yield from _READERS[kind](content, where)


_WORDS = {"list": "a list of {image, caption}", "coco": "COCO captions", "karpathy": "a Karpathy split"}


def _listed(content: list[Any], where: str) -> Iterator[Entry]:
    for number, entry in enumerate(content):
        if not isinstance(entry, dict):
            yield Entry(number, None, (), words=short(entry))
            continue
        captions, left_out = strings(entry.get("caption"))
        negatives = entry.get("negatives") or {}
        kinds = negatives if isinstance(negatives, dict) else {"negatives": negatives}
        wrong = {str(kind): strings(texts)[0] for kind, texts in kinds.items()}
        image = path_of(entry.get("image"))
        words = "" if image else short(entry)
        yield Entry(number, image, captions, left_out, entry.get("image_id"), None, wrong, words)


def _coco(content: dict[str, Any], where: str) -> Iterator[Entry]:
    captions: dict[Any, list[Any]] = {}
    try:
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
        for number, image in enumerate(content["images"]):
            found, left_out = strings(captions.pop(image["id"], []))
            yield Entry(number, path_of(image["file_name"]), found, left_out, image["id"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: expected COCO captions (images, annotations), missing {error}") from error
    if captions:
        first = next(iter(captions))
        raise UserError(f"{where}: {len(captions)} annotations name images that are not listed, the first is {first!r}")


def _karpathy(content: dict[str, Any], where: str) -> Iterator[Entry]:
    for number, image in enumerate(content["images"]):
        if not isinstance(image, dict) or "split" not in image:
            raise UserError(
                f"{where}: images[{number}]: expected an image with its split (Karpathy's format), got {short(image)}"
            )
        try:
            found, left_out = strings([sentence["raw"] for sentence in image["sentences"]])
            name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: images[{number}]: expected filename and sentences with raw, got {short(image)}"
            ) from error
        number_given = image.get("cocoid", image.get("imgid"))
        yield Entry(number, path_of(name), found, left_out, number_given, str(image["split"]))


_READERS: dict[Kind, Callable[[Any, str], Iterator[Entry]]] = {"list": _listed, "coco": _coco, "karpathy": _karpathy}


def strings(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The captions in one value or a list of them, stripped; and, in words, what is none."""
    listed = value if isinstance(value, list | tuple) else [value]
    captions = tuple(text.strip() for text in listed if isinstance(text, str) and text.strip())
    return captions, tuple(_called(text) for text in listed if not (isinstance(text, str) and text.strip()))


def _called(value: Any) -> str:
    if value is None:
        return "null caption"
    if isinstance(value, str):
        return "blank caption"
    return f"caption that is a {'number' if isinstance(value, int | float) else type(value).__name__}"


def path_of(value: Any) -> str | None:
    """An image's path as it is given, with the slashes of this system; None where the value is no path."""
    if not isinstance(value, str) or not value.strip():
        return None
    return value.replace("\\", "/") if "\\" in value and "/" not in value else value


def short(value: Any) -> str:
    """A value for a message."""
    text = json.dumps(value, default=str)
    return text if len(text) < 80 else f"{text[:77]}..."
