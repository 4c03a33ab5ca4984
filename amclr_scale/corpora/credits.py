"""Who drew what, under which licence, and what became of it: CREDITS.md, credits/PREFIX.txt, and the class list."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from amclr_scale.corpora.icon_sets import KEPT_LICENCES, IconSet, why_left_out
from amclr_scale.corpora.icon_splits import Picture


def write_credits(
    out: Path,
    sets: Sequence[IconSet],
    pictures: Sequence[Picture],
    splits: Mapping[str, Iterable[Picture]],
    kinds: Mapping[str, str],
) -> None:
    """Write the files into `out`.

    Args:
        sets: all of the archive, those that are left out as well.
        pictures: what is kept.
        kinds: of the sets that are kept, by prefix.
    """
    kept = Counter(picture.prefix for picture in pictures)
    used = defaultdict(set)
    for split, found in splits.items():
        for picture in found:
            used[picture.prefix].add(split)
    lines = [
        "# Credits",
        "",
        "Pictures were drawn from the artists' SVG files at one size on white; nothing else was changed. Each sample's",
        "JSON names its set and its licence.",
        "",
        "| set | title | artist | licence | kind | pictures | held out |",
        "|---|---|---|---|---|---|---|",
    ]
    (out / "credits").mkdir(exist_ok=True)
    for one in sets:
        if not kept[one.prefix]:
            continue
        held = ", ".join(sorted(used[one.prefix] & {"val_style", "tune_style"}))
        author = f"[{one.author}]({one.author_url})" if one.author_url else one.author
        licence = f"[{one.licence}]({one.licence_url})" if one.licence_url else one.licence
        row = (one.prefix, one.title, author, licence, kinds[one.prefix], f"{kept[one.prefix]:,}", held)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |")
        (out / "credits" / f"{one.prefix}.txt").write_text(
            f"{one.title}\nby {one.author} {one.author_url}\n{one.licence_title} ({one.licence}): "
            f"{KEPT_LICENCES[one.licence]}\n{one.licence_url}\n{kept[one.prefix]:,} pictures, drawn from SVG.\n",
            "utf-8",
        )
    left_out = [one for one in sets if one.names and why_left_out(one.licence)]
    lines += ["", "## Not in the corpus", "", "| set | licence | why | icons |", "|---|---|---|---|"]
    lines += [
        f"| {one.prefix} | {one.licence} | {why_left_out(one.licence)} | {len(one.names):,} |" for one in left_out
    ]
    (out / "CREDITS.md").write_text("\n".join(lines) + "\n", "utf-8")

    total, trained = Counter(one.concept for one in pictures), Counter(one.concept for one in splits["train"])
    drawn_by = defaultdict(set)
    for picture in pictures:
        drawn_by[picture.concept].add(picture.prefix)
    with (out / "concepts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["concept", "pictures", "sets", "train"])
        for concept in sorted(total, key=lambda name: (-total[name], name)):
            writer.writerow([concept, total[concept], len(drawn_by[concept]), trained[concept]])
