"""Captions to token ids (n, L), by any of several vocabularies, all of them offline.

    emoji               byte-pair encoding trained on the embedded corpus' captions; ships with the package
    clip                OpenAI CLIP's byte-pair encoding, out of the open_clip_torch package
    FILE.json           a tokenizer.json of the `tokenizers` library (amclr-scale shards tokenizer writes one)
    FOLDER              a transformers tokenizer (tokenizer.json, vocab.txt, ...)

Every row is [start] tokens [end] padding, without a start where a folder's tokenizer adds an end and no start: the last
token that is not padding is the end token, also where the caption was cut to L. Half of a surrogate pair, which JSON
can hold and UTF-8 cannot, counts as U+FFFD.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from amclr_scale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

EMOJI = Path(__file__).parent / "corpora" / "emoji" / "tokenizer.json"
_NAMED = "amclr_scale_tokenizer.json"  # in a saved folder: the name of a tokenizer that comes with a package
_FINGERPRINT = "fingerprint.txt"  # in a saved folder: what `Tokenizer.fingerprint` said
_START = ("[CLS]", "<s>", "<|startoftext|>", "<start_of_text>", "<bos>")
_END = ("[SEP]", "</s>", "<|endoftext|>", "<end_of_text>", "<eos>")
_PAD = ("[PAD]", "<pad>", "<|pad|>")

# Captions that vocabularies treat differently: case, accents, numbers, marks, other scripts, white space, none at all.
_PROBES = (
    "A photo of 2 cats, don't you think?", "CAF\u00c9 na\u00efve \u00dcber stra\u00dfe", "3.14159e-10 #1 $5 50%", "",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4", "\U0001f600\U0001f1e9\U0001f1ea", "a\tb  c\nd", "x" * 100,
)  # fmt: skip
_MARKS = re.compile("\u0120|\u2581|##|</w>")  # how vocabularies write where a word begins, goes on or ends
_ENTRIES = 4000  # of the vocabulary that a fingerprint looks up

Encode = Callable[[list[str]], list[list[int]]]


class Tokenizer:
    """`tokenizer(captions)` -> (n, L) int64; a string by itself is one caption.

    Attributes:
        spec: what it was loaded from.
        vocab_size: ids are below it.
        pad_id: fills rows up; may equal `end_id` only where the vocabulary has no padding of its own.
        start_id: the start token; None: captions begin with their first word (SigLIP).
        end_id: the end token.
    """

    def __init__(
        self,
        spec: str,
        encode: Encode,
        write: Callable[[Path], object],
        vocabulary: Callable[[], Mapping[str, int]],
        *,
        vocab_size: int,
        pad_id: int,
        start_id: int | None,
        end_id: int,
        length: int,
    ):
        self.spec, self.vocab_size, self.context_length = spec, vocab_size, length
        self.pad_id, self.start_id, self.end_id = pad_id, start_id, end_id
        self._before = [] if start_id is None else [start_id]
        self._encode, self._write, self._vocabulary = encode, write, vocabulary

    def __call__(self, captions: Sequence[str] | str) -> "Tensor":
        import torch  # here, as commands that make shards or vocabularies read captions without it

        captions = [captions] if isinstance(captions, str) else captions
        rows, length = list[list[int]](), self.context_length
        for tokens in self._encode([well_formed(caption) for caption in captions]) if captions else ():
            kept = [*self._before, *tokens[: length - 1 - len(self._before)], self.end_id]
            rows.append(kept + [self.pad_id] * (length - len(kept)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` needs to make the same rows, for a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        (folder / _FINGERPRINT).write_text(self.fingerprint() + "\n")

    def check_saved(self, folder: Path) -> None:
        """Raise `UserError` if this, loaded from the folder, is not what was saved there."""
        file = folder / _FINGERPRINT
        if file.is_file() and (expected := file.read_text().strip()) != (found := self.fingerprint()):
            raise UserError(
                f"data.tokenizer: {folder} does not give the token ids that the model was trained with: fingerprint "
                f"{found}, expected {expected}; its files were changed, or the library that reads them was"
            )

    def files(self) -> dict[str, bytes]:
        """The content of those files, by name."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    def fingerprint(self) -> str:
        """Of what it does to captions, whatever file it came from; 32 hex digits.

        It covers the special tokens, every entry of the vocabulary with its number, and the rows of some thousand
        entries and of captions with all kinds of characters. The first time takes up to some tenths of a second.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        known = sorted(self._vocabulary().items())
        some = [_MARKS.sub("", entry) for entry, _ in known[:: max(1, len(known) // _ENTRIES)]]
        texts = [*_PROBES, *some, *(f"x{entry}" for entry in some)]  # where a word begins, and inside of one
        special = [self.vocab_size, self.pad_id, self.start_id, self.end_id]
        words = json.dumps([special, known, self._encode(texts)])
        return hashlib.sha256(words.encode()).hexdigest()[:32]


def well_formed(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair: a caption that was cut inside an emoji."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def load_tokenizer(spec: str, context_length: int) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Raises:
        UserError: there is no such tokenizer here, or it lacks a start, end or padding token.
    """
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # its threads do not survive a fork; workers are our parallelism
    if spec == "emoji":
        return _from_json(spec, EMOJI, context_length)
    if spec == "clip":
        return _clip(context_length)
    path = Path(spec).expanduser()
    if path.is_file():
        return _from_json(spec, path, context_length)
    if (path / _NAMED).is_file():
        return _named(path / _NAMED, context_length)
    if path.is_dir():
        if {file.name for file in path.iterdir()} - {_FINGERPRINT} == {"tokenizer.json"}:
            return _from_json(spec, path / "tokenizer.json", context_length)
        return _from_folder(spec, path, context_length)
    raise UserError(
        f"data.tokenizer: expected emoji, clip, a tokenizer.json or a local folder of a transformers tokenizer, got "
        f"{spec!r}, which is none of them; names on a hub are not downloaded: save the tokenizer to a folder first"
    )


def _named(file: Path, context_length: int) -> Tokenizer:
    """The tokenizer of a package that a saved folder names; a folder names no other folder, least of all itself."""
    try:
        name = json.loads(file.read_text("utf-8"))["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"data.tokenizer: {file}: expected the name of a tokenizer, got {error!r:.100}") from error
    if name not in ("emoji", "clip"):
        raise UserError(f"data.tokenizer: {file}: expected emoji or clip, got {str(name)[:100]!r}")
    return load_tokenizer(str(name), context_length)


def _first(known: Sequence[str], lookup: Callable[[str], int | None], spec: str, what: str) -> int:
    for token in known:
        found = lookup(token)
        if found is not None:
            return found
    raise UserError(f"data.tokenizer: {spec}: expected {what} token, one of {' '.join(known)}; it has none of them")


def _rows(entries: int, vocabulary: Mapping[str, int]) -> int:
    """Rows that a table of embeddings needs: where numbers have holes, the largest one decides."""
    return max(entries, max(vocabulary.values()) + 1)


def _from_json(spec: str, path: Path, context_length: int) -> Tokenizer:
    from tokenizers import Tokenizer as Vocabulary

    try:
        vocabulary = Vocabulary.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"data.tokenizer: {path}: expected a tokenizer.json, got {error}") from error
    vocabulary.no_padding()
    vocabulary.no_truncation()
    end = _first(_END, vocabulary.token_to_id, spec, "an end")
    start = _first(_START, vocabulary.token_to_id, spec, "a start")
    pads = [token for token in map(vocabulary.token_to_id, _PAD) if token is not None]

    def encode(captions: list[str]) -> list[list[int]]:
        return [found.ids for found in vocabulary.encode_batch_fast(captions, add_special_tokens=False)]

    return Tokenizer(
        spec,
        encode,
        lambda folder: vocabulary.save(str(folder / "tokenizer.json")),
        vocabulary.get_vocab,
        vocab_size=_rows(vocabulary.get_vocab_size(), vocabulary.get_vocab()),
        pad_id=pads[0] if pads else end,
        start_id=start,
        end_id=end,
        length=context_length,
    )


def _clip(context_length: int) -> Tokenizer:
    from amclr_scale.torchvision_ops import import_torchvision

    try:
        import_torchvision()
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise UserError(
            f"data.tokenizer: clip needs the package open_clip_torch: {error}; pip install open_clip_torch"
        ) from error
    vocabulary = SimpleTokenizer()
    return Tokenizer(
        "clip",
        lambda captions: [vocabulary.encode(caption) for caption in captions],
        lambda folder: (folder / _NAMED).write_text(json.dumps({"tokenizer": "clip"})),
        lambda: vocabulary.encoder,
        vocab_size=int(vocabulary.vocab_size),
        pad_id=0,
        start_id=int(vocabulary.sot_token_id),
        end_id=int(vocabulary.eot_token_id),
        length=context_length,
    )


def _from_folder(spec: str, folder: Path, context_length: int) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        vocabulary = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"data.tokenizer: {folder}: expected a folder of a transformers tokenizer, got: {first}"
        ) from error
    start = vocabulary.cls_token_id if vocabulary.cls_token_id is not None else vocabulary.bos_token_id
    end = vocabulary.sep_token_id if vocabulary.sep_token_id is not None else vocabulary.eos_token_id
    own = vocabulary("a", verbose=False)["input_ids"]  # with the special tokens that it adds by itself
    if end is not None and own[-1:] == [end] and start not in own:
        start = None  # it ends captions and does not begin them
    elif start is None or end is None:
        raise UserError(
            f"data.tokenizer: {folder}: expected a start and an end token (cls/bos, sep/eos), got {start}, {end}"
        )
    pad = vocabulary.pad_token_id

    def encode(captions: list[str]) -> list[list[int]]:
        found = vocabulary(captions, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        return [list(ids) for ids in found["input_ids"]]

    return Tokenizer(
        spec,
        encode,
        lambda place: vocabulary.save_pretrained(str(place)),
        vocabulary.get_vocab,
        vocab_size=_rows(len(vocabulary), vocabulary.get_vocab()),
        pad_id=end if pad is None else pad,
        start_id=start,
        end_id=end,
        length=context_length,
    )
