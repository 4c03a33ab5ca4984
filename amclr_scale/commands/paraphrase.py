"""Write K paraphrases of every caption once, with any seq2seq model of transformers, beside the shards.

    amclr-scale shards paraphrase emoji/train --model /models/chatgpt_paraphraser_on_T5_base --out paraphrases/
    amclr-scale shards paraphrase shards/cc3m --model PATH --filter /models/all-MiniLM-L6-v2 --rank 3 --ranks 8 ...

    data: {text_view: paraphrases, paraphrases: paraphrases/, text_views: 1}       then in the configuration

The sampling defaults are those of AmCLR's authors (prefix "paraphrase: ", top-k 120, top-p 0.95), whose training loop
runs the model in every step; here it runs once. A candidate is kept when it differs from the caption and from those
kept before it, and, with --filter, when the cosine of its sentence embedding with the caption's is between --min-
cosine and --max-cosine. The share that was kept is printed and stored. Each shard appears whole or not at all; an
interrupted run goes on, and several processes (--rank of --ranks, one per GPU) share the shards. It goes on with the
options that it began with; a model is known by its files, wherever it lies (one of a hub: by its name). The same seed
gives the same paraphrases on the same hardware, whatever was interrupted.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from amclr_scale.commands.words import check_at_least, command_parser, run_command
from amclr_scale.config import schema
from amclr_scale.data.beside.paraphrases import ParaphraseReader, paraphrase_file, write_paraphrases
from amclr_scale.data.decoding import BadSampleError, Field, Sample, check_whole
from amclr_scale.data.index import Index
from amclr_scale.data.indexing import open_index
from amclr_scale.data.tokenizers import well_formed
from amclr_scale.errors import UserError

if TYPE_CHECKING:
    import torch

# Options that paraphrases depend on, kept beside them: those that are there already must have been made by the same.
MODELS = ("model", "filter")  # known by their files, not by how a folder is written
KEPT = (*MODELS, "caption", "count", "prefix", "top_k", "top_p", "temperature", "max_tokens", "seed")
LIMITS = {"min_cosine": 0.8, "max_cosine": 0.995}  # kept too, with a filter; nothing reads them without one
SHA256 = "_sha256"
FILES = (".json", ".txt", ".model", ".safetensors", ".bin")  # of a model's folder: what transformers reads
Generate = Callable[[Sequence[str]], list[list[str]]]
Similarity = Callable[[Sequence[str], Sequence[str]], "torch.Tensor"]


def load(path: str, kind: str, option: str, device: "torch.device") -> tuple[Any, Any]:
    """(tokenizer, model) of a local folder or a hub name.

    Raises:
        UserError: transformers cannot load it.
    """
    import torch

    from amclr_scale.torchvision_ops import import_torchvision

    import_torchvision()  # transformers looks at torchvision while it is imported
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        kept = torch.bfloat16 if device.type == "cuda" else torch.float32
        made = getattr(transformers, kind).from_pretrained(path, dtype=kept, trust_remote_code=False)
        model = made.to(device).eval()
    except Exception as error:  # the library raises many kinds
        raise UserError(
            f"{option}: {path}: expected a folder (or hub name) that transformers loads as {kind}, got: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    return tokenizer, model


def generator(path: str, arguments: argparse.Namespace, device: "torch.device") -> Generate:
    """Captions -> for each, several candidates (twice as many as wanted: some will not be kept)."""
    import torch

    tokenizer, model = load(path, "AutoModelForSeq2SeqLM", "--model", device)
    candidates = 2 * arguments.count

    @torch.no_grad()
    def generate(captions: Sequence[str]) -> list[list[str]]:
        prefixed = [arguments.prefix + caption for caption in captions]
        inputs = tokenizer(
            prefixed, return_tensors="pt", padding=True, truncation=True, max_length=arguments.max_tokens
        )
        inputs.pop("token_type_ids", None)
        rows = model.generate(
            **inputs.to(device), do_sample=True, top_k=arguments.top_k, top_p=arguments.top_p,
            temperature=arguments.temperature, max_new_tokens=arguments.max_tokens, num_return_sequences=candidates,
        )  # fmt: skip
        words = [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
        return [words[i * candidates : (i + 1) * candidates] for i in range(len(captions))]

    return generate


def similarity(path: str, device: "torch.device") -> Similarity:
    """(n texts, n texts) -> (n,) cosines of mean-pooled sentence embeddings."""
    import torch

    tokenizer, model = load(path, "AutoModel", "--filter", device)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> torch.Tensor:
        inputs = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=128).to(device)
        hidden = model(**inputs).last_hidden_state.float()  # (n, L, width)
        mask = inputs["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    return lambda first, second: (embed(first) * embed(second)).sum(-1).cpu()


def keep(
    caption: str, candidates: Sequence[str], cosines: Sequence[float] | None, limits: tuple[float, float], count: int
) -> list[str]:
    """The first `count` candidates that are new and close enough in meaning."""
    kept, seen = list[str](), {_bare(caption)}
    for i, candidate in enumerate(candidates):
        close = cosines is None or limits[0] <= cosines[i] <= limits[1]
        if candidate and close and _bare(candidate) not in seen and len(kept) < count:
            seen.add(_bare(candidate))
            kept.append(candidate)
    return kept


def _bare(text: str) -> str:
    return " ".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


def captions_of(index: Index, shard: int, field: Field) -> Iterator[str | None]:
    """The first caption of every row; None where there is none."""
    limits = schema.Data()
    reader = index.reader(shard)
    for row in range(index.shards[shard].num_samples):
        try:
            check_whole(reader, row)
            members = reader.read(row, frozenset({field.member}))
            sample = Sample(members, limits.max_image_pixels, limits.max_caption_characters)
            yield well_formed(sample.captions(field)[0])
        except BadSampleError:
            yield None


def paraphrase_shard(
    captions: list[str | None], generate: Generate, alike: Similarity | None, arguments: argparse.Namespace
) -> tuple[list[list[str]], int, int]:
    """(paraphrases of every row, candidates, those kept)."""
    rows: list[list[str]] = [[] for _ in captions]
    asked, kept = 0, 0
    known = [(row, caption) for row, caption in enumerate(captions) if caption]
    for start in range(0, len(known), arguments.batch):
        part = known[start : start + arguments.batch]
        found = generate([caption for _, caption in part])
        for (row, caption), candidates in zip(part, found, strict=True):
            cosines = alike([caption] * len(candidates), candidates).tolist() if alike else None
            limits = (arguments.min_cosine, arguments.max_cosine)
            rows[row] = keep(caption, candidates, cosines, limits, arguments.count)
            asked += len(candidates)
            kept += len(rows[row])
    return rows, asked, kept


def asked_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that paraphrases are made by, and digests of the models' files, as they are kept."""
    names = [*KEPT, *(LIMITS if arguments.filter else ())]
    places = {name: getattr(arguments, name) for name in MODELS}
    digests = {name + SHA256: digest_of(place) for name, place in places.items() if place is not None}
    return {**{name: getattr(arguments, name) for name in names}, **digests}


def digest_of(place: str) -> str | None:
    """Of the files that a model in a local folder consists of; None of a hub's, whose files transformers finds."""
    from amclr_scale.evaluation.suites.files import content

    folder = Path(place)
    if not folder.is_dir():
        return None
    return content({path.name: path for path in folder.iterdir() if path.suffix in FILES and path.is_file()})


def finished(out: Path, index: Index, shard: int, asked: dict[str, Any]) -> bool:
    """Whether a shard has its paraphrases already.

    Args:
        asked: the options that they are to be made by.

    Raises:
        UserError: it has some that were made by other options.
    """
    file = paraphrase_file(out, index.shards[shard])
    if not file.is_file():
        return False
    ParaphraseReader(out, index.shards[shard]).close()
    with file.open(encoding="utf-8") as lines:
        made = json.loads(next(lines))
    for name in (name for name in (*KEPT, *LIMITS) if name in asked and name in made):
        if same_model(name, asked, made) if name in MODELS else asked[name] == made[name]:
            continue
        if asked[name] == made[name]:
            raise UserError(
                f"--{name}: expected the files that {made[name]} had when {file} was made, got others; put those back, "
                "or choose another --out"
            )
        raise UserError(
            f"--{name.replace('_', '-')}: expected {made[name]!r}, by which {file} was made, got {asked[name]!r}; "
            "go on with that, or choose another --out"
        )
    return True


def same_model(name: str, asked: dict[str, Any], made: dict[str, Any]) -> bool:
    """Whether a model is the one that was used: by its files, or, where their digest was not kept, by its place."""
    here, there, digest = asked[name], made[name], name + SHA256
    if digest in asked and digest in made and (asked[digest] or made[digest]):
        return bool(asked[digest] == made[digest])  # a folder is no hub's model, whatever it is called
    if here is None or there is None or not Path(here).is_dir():
        return bool(here == there)  # no filter, or a hub's name
    return Path(here).resolve() == Path(there).resolve()


def work(argv: list[str]) -> None:
    """What `main` does, without the words for mistakes."""
    parser = command_parser("shards paraphrase", __doc__)
    parser.add_argument("data", nargs="+", help="shards, named as in data.train")
    parser.add_argument("--model", required=True, help="seq2seq model: a local folder or a hub name")
    parser.add_argument("--out", type=Path, required=True, help="folder for the paraphrases")
    parser.add_argument("--caption", default="txt", help="where captions are: txt or json.FIELD")
    parser.add_argument("--count", type=int, default=3, help="paraphrases per caption, at most")
    parser.add_argument("--prefix", default="paraphrase: ", help="what the model wants before a caption")
    parser.add_argument("--top-k", type=int, default=120, help="sampling: tokens considered")
    parser.add_argument("--top-p", type=float, default=0.95, help="sampling: probability considered")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest paraphrase")
    parser.add_argument("--batch", type=int, default=64, help="captions at once")
    parser.add_argument("--filter", help="sentence encoder for the filter of meaning: a local folder or a hub name")
    parser.add_argument(
        "--min-cosine", type=float, help="with --filter: least similarity to the caption (default: 0.8)"
    )
    parser.add_argument("--max-cosine", type=float, help="with --filter: largest; copies are above (default: 0.995)")
    parser.add_argument("--rank", type=int, default=0, help="of --ranks processes, each with its own shards")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the work")
    parser.add_argument("--device", help="default: a GPU by --rank, or the CPU where there is none")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.rank < arguments.ranks:
        raise UserError(f"--rank: expected 0 .. {arguments.ranks - 1}, got {arguments.rank}")
    check_at_least(arguments, 1, "count", "top_k", "max_tokens", "batch")
    for name, limit in LIMITS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, limit)
        elif not arguments.filter:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: expected --filter beside it, whose cosines it limits, got none; leave it out")
    import torch

    from amclr_scale.distributed.process_group import named_device

    if arguments.device:
        named_device(arguments.device)  # before the shards are opened

    index = open_index(schema.Data(train=arguments.data, caption=arguments.caption), key="data")
    names = [paraphrase_file(arguments.out, shard).name for shard in index.shards]
    if len(set(names)) < len(names):
        raise UserError(
            "data: expected shards of different names (paraphrases are named after them); use one --out for each"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    own = range(arguments.rank, len(index.shards), arguments.ranks)
    asked = asked_of(arguments)
    todo = [shard for shard in own if not finished(arguments.out, index, shard, asked)]
    if todo:
        gpus = torch.cuda.device_count()
        device = named_device(arguments.device or (f"cuda:{arguments.rank % gpus}" if gpus else "cpu"))
        generate = generator(arguments.model, arguments, device)
        alike = similarity(arguments.filter, device) if arguments.filter else None
        field = Field.parse(arguments.caption)
        for shard in track(todo, "Paraphrasing", console=Console(stderr=True)):
            torch.manual_seed(arguments.seed * 1_000_003 + shard)  # of the shard, not of the history
            rows, number, kept = paraphrase_shard(list(captions_of(index, shard, field)), generate, alike, arguments)
            origin = {**asked, "candidates": number, "kept": kept}
            write_paraphrases(arguments.out, index.shards[shard], origin, rows)
    report(arguments.out, index, own)


def report(out: Path, index: Index, own: range) -> None:
    """Say how much was kept, from what the files say."""
    origins = [json.loads(paraphrase_file(out, index.shards[shard]).open().readline()) for shard in own]
    asked, kept = (sum(origin[name] for origin in origins) for name in ("candidates", "kept"))
    samples = sum(index.shards[shard].num_samples for shard in own)
    share = f"{kept / max(asked, 1):.1%}"
    print(f"{out}: {kept:,} paraphrases of {samples:,} samples kept, out of {asked:,} candidates ({share})")


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 a mistake, told in words, 1 a full or closed disk."""
    return run_command(work, argv)
