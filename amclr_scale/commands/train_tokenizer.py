"""Train a byte-pair vocabulary on the captions of some shards and write it as one tokenizer.json.

    amclr-scale shards tokenizer emoji/train --captions json.captions txt --out tokenizer.json

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", ACL 2016, arXiv:1508.07909, on bytes,
so that no text is unknown. The same captions give the same file, byte for byte. (WordPiece training in the same library
does not: its entries follow the order of a hash map.)
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from amclr_scale.commands.words import check_place, command_parser, run_command
from amclr_scale.config import schema
from amclr_scale.data.decoding import BadSampleError, Field, Sample, check_whole
from amclr_scale.data.index import Index
from amclr_scale.data.indexing import open_index
from amclr_scale.data.tokenizers import well_formed
from amclr_scale.errors import UserError

SPECIAL = ["[PAD]", "[CLS]", "[SEP]"]
LEAST = 256 + len(SPECIAL)  # entries: every byte has one


def captions_of(index: Index, fields: list[Field], limits: schema.Data) -> Iterator[tuple[int, str]]:
    """Every caption of every readable sample, behind the number of its field."""
    wanted = frozenset(field.member for field in fields)
    for shard, entry in enumerate(index.shards):
        reader = index.reader(shard)
        for row in range(entry.num_samples):
            with suppress(BadSampleError):
                check_whole(reader, row)
                sample = Sample(reader.read(row, wanted), limits.max_image_pixels, limits.max_caption_characters)
                for number, field in enumerate(fields):
                    with suppress(BadSampleError):
                        yield from ((number, well_formed(caption)) for caption in sample.captions(field))


def train(captions: Counter[str], entries: int) -> Tokenizer:
    """A lower-casing byte-level BPE of at most `entries` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(captions.elements()), trainer=trainer)
    return tokenizer


def work(argv: list[str]) -> None:
    """What `main` does, without the words for mistakes."""
    parser = command_parser("shards tokenizer", __doc__)
    parser.add_argument("data", nargs="+", help="shards, named as in data.train")
    parser.add_argument("--captions", nargs="+", default=["txt"], help="where captions are: txt, json.FIELD")
    parser.add_argument("--entries", type=int, default=4096, help="largest size of the vocabulary")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    arguments = parser.parse_args(argv)
    if arguments.entries < LEAST:
        raise UserError(f"--entries: expected at least {LEAST}, of bytes and marks alone, got {arguments.entries}")
    check_place("--out", arguments.out)
    settings = schema.Data(train=arguments.data, caption=arguments.captions[0])
    index = open_index(settings, key="data")
    counts, found = Counter[str](), set[int]()
    for number, text in captions_of(index, [Field.parse(words) for words in arguments.captions], settings):
        counts[text] += 1
        found.add(number)
    if empty := [words for number, words in enumerate(arguments.captions) if number not in found]:
        raise UserError(
            f"--captions: expected txt or json.FIELD that samples have, got {', '.join(empty)}: none has it"
        )
    tokenizer = train(counts, arguments.entries)
    tokenizer.save(str(arguments.out))
    entries, captions = tokenizer.get_vocab_size(), counts.total()
    print(f"{arguments.out}: {entries:,} entries from {captions:,} captions ({len(counts):,} distinct)")


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 a mistake, told in words, 1 a full or closed disk."""
    return run_command(work, argv)
