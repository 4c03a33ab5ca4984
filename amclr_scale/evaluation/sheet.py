"""A sheet of pictures: captions with the five images that a model finds nearest, successes and failures."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from amclr_scale.evaluation.encode import Encode, encode_images, encode_texts
from amclr_scale.evaluation.evaluators import gallery
from amclr_scale.evaluation.retrieval import tie
from amclr_scale.evaluation.shares import gather_rows, share
from amclr_scale.evaluation.splits import Task
from amclr_scale.similarity import top_k

SHOWN = 5
CELL, TEXT, GAP = 96, 260, 8  # pixels
RIGHT, WRONG, INK, PAPER = (30, 140, 60), (190, 60, 50), (30, 30, 30), (255, 255, 255)

NOTHING = "evaluation.sheet: no picture is drawn, for no split has captions to find images for"


def file_names(splits: Iterable[str]) -> dict[str, str]:
    """Of the sheets of a run, by split: sheet_a_b.png for a/b, and sheet_a_b_2.png where another has that name."""
    found: dict[str, str] = {}
    for split in splits:
        stem = f"sheet_{split.replace('/', '_')}"
        names = [f"{stem}.png", *(f"{stem}_{number}.png" for number in range(2, len(found) + 3))]
        found[split] = next(name for name in names if name not in found.values())
    return found


@dataclass(frozen=True)
class Row:
    """One caption and what was found for it."""

    caption: str
    found: list[int]  # numbers of images, nearest first
    right: int
    tied: int  # of the found ones, how many first ones have the same score; 1: no tie


def text_to_image_sheet(encode: Encode, task: Task, batch_size: int, rows: int = 6, seed: int = 0) -> Image.Image:
    """`rows` captions whose image comes first and `rows` whose does not, drawn at random. All ranks call it together.

    The right image has a green frame; where it is not among the first five, it stands at the end of its row. Images
    that share the highest score are marked as tied: a right one among them is not found, as in R@1.
    """
    (image,) = encode_images(encode, task.split, batch_size)
    texts, owners, _, keep = gallery(task.split)
    here = share(task.split.num_samples)
    (text,) = encode_texts(encode, task.split.reading.tokenizer, texts, batch_size)
    images = int(keep.sum())
    scores, found = top_k(text, image[keep[here.start : here.stop].to(image.device)], min(SHOWN, images))
    tied = (scores[:, :1] - scores <= tie(scores.dtype)).sum(1)
    found, tied = gather_rows(found).cpu(), gather_rows(tied).cpu()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    first = [bool(tied[i] == 1 and found[i, 0] == owners[i]) for i in range(len(texts))]
    parts = [[i for i in order if first[i]][:rows], [i for i in order if not first[i]][:rows]]
    listed = [[Row(texts[i], found[i].tolist(), int(owners[i]), int(tied[i])) for i in part] for part in parts]
    wanted = sorted({number for part in listed for row in part for number in (*row.found, row.right)})
    return _draw(task.name, listed, _pixels(task, keep, wanted, batch_size), shares=sum(first) / len(first))


def _pixels(task: Task, keep: Tensor, wanted: list[int], batch_size: int) -> dict[int, Image.Image]:
    """The wanted images of the gallery, read where they are, on every rank."""
    place = keep.cumsum(0) - 1
    numbers = torch.tensor(wanted)
    mine, pixels = [], []
    for batch in task.split.batches(batch_size):
        for sample, picture in zip(batch.ids.tolist(), batch.images[0], strict=True):
            if keep[sample] and bool((numbers == place[sample]).any()):
                mine.append(int(place[sample]))
                pixels.append(picture)
    stacked = torch.stack(pixels) if pixels else task.split.reading.blank[:0]
    stacked = stacked if stacked.dtype == torch.uint8 else stacked.mul(255).round().to(torch.uint8)
    whose, shown = gather_rows(torch.tensor(mine, dtype=torch.int64)), gather_rows(stacked)
    return {
        number: Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).resize((CELL, CELL))
        for number, picture in zip(whose.tolist(), shown, strict=True)
    }


def _draw(name: str, parts: list[list[Row]], pictures: dict[int, Image.Image], *, shares: float) -> Image.Image:
    font, bold = ImageFont.load_default(14), ImageFont.load_default(18)
    width = TEXT + (SHOWN + 1) * (CELL + GAP) + 4 * GAP
    height = 2 * GAP + sum(32 + len(part) * (CELL + GAP) for part in parts if part)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = GAP
    titles = (f"{name}: found at once ({100 * shares:.1f} %)", f"not found at once ({100 * (1 - shares):.1f} %)")
    for title, part in zip(titles, parts, strict=True):
        if not part:
            continue
        draw.text((GAP, y), title, INK, font=bold)
        y += 32
        for row in part:
            draw.multiline_text((GAP, y + GAP), "\n".join(textwrap.wrap(row.caption, 34)[:4]), INK, font=font)
            missed = row.right not in row.found
            for place, number in enumerate([*row.found, *([row.right] if missed else [])]):
                x = TEXT + place * (CELL + GAP) + (3 * GAP if place == len(row.found) else 0)
                sheet.paste(pictures[number], (x, y))
                colour = RIGHT if number == row.right else WRONG
                draw.rectangle((x - 2, y - 2, x + CELL + 1, y + CELL + 1), outline=colour, width=3)
                if row.tied > 1 and place < row.tied:
                    draw.rectangle((x + 1, y + CELL - 17, x + 34, y + CELL - 2), fill=PAPER)
                    draw.text((x + 4, y + CELL - 18), "tied", INK, font=font)
            y += CELL + GAP
    return sheet
