"""A report as a document: tables and figures with their CSV, Markdown, and one self-contained page of HTML.

The page is the Markdown, rendered by markdown-it-py with every picture inside it: nothing is fetched from anywhere, and
both say the same. Pictures are SVG on the page and PNG beside the Markdown.
"""

import base64
import csv
import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Text for readers, and the same in full precision for programs.

    Attributes:
        name: of the CSV file.
        header: column headings.
        rows: text of every cell; line breaks become <br>.
        raw: one record per line of the CSV.
        left: columns of words, set flush left; others are numbers.
    """

    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    raw: Sequence[Raw]
    left: int = 1
    words: Sequence[int] = field(default_factory=tuple)

    def markdown(self) -> str:
        rule = ["---" if i < self.left or i in self.words else "---:" for i in range(len(self.header))]
        head, *body = ([escape(cell) for cell in row] for row in (self.header, *self.rows))
        lines = [head, rule, *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Figure:
    """A drawn figure and the numbers in it."""

    name: str
    caption: str
    raw: Sequence[Raw]
    png: bytes
    svg: bytes

    def markdown(self) -> str:
        return f"![{escape(self.caption)}]({self.name}.png)"


@dataclass
class Document:
    """A report before it is written: prose, tables and figures in reading order."""

    parts: list[str | Table | Figure] = field(default_factory=list)

    @property
    def tables(self) -> list[Table]:
        return [part for part in self.parts if isinstance(part, Table)]

    @property
    def figures(self) -> dict[str, Figure]:
        """By name."""
        return {part.name: part for part in self.parts if isinstance(part, Figure)}

    @property
    def markdown(self) -> str:
        """The whole report, every table and figure with a link to its CSV."""
        return joined(
            part if isinstance(part, str) else f"{part.markdown()}\n\nData: [{part.name}.csv]({part.name}.csv)"
            for part in self.parts
        )

    def say(self, *parts: str) -> None:
        self.parts += parts

    def table(self, table: Table) -> None:
        """A table, if it has rows."""
        if table.rows:
            self.parts.append(table)

    def figure(self, figure: Figure | None) -> None:
        if figure is not None:
            self.parts.append(figure)


def joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Text for a cell of a Markdown table: nothing in it is markup."""
    for character, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("`", "&#96;")):
        text = text.replace(character, written)
    return re.sub(r"([*_\[\]\\])", r"\\\1", text).replace("\n", "<br>")


def csv_text(records: Sequence[Raw]) -> str:
    """One line per record, all columns that any of them has; empty where unknown."""
    out = io.StringIO()
    columns = dict.fromkeys(key for record in records for key in record)
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{key: _plain(value) for key, value in record.items()} for record in records])
    return out.getvalue()


def _plain(value: Any) -> Any:
    return "" if value is None or _unknown(value) else value


def _unknown(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def json_text(tables: Iterable[Table | Figure], digits: int = 17) -> str:
    """All records by the name of their table or figure, one in a line; null where unknown.

    Args:
        digits: significant ones of numbers that are no integers; 17 are all of them.
    """

    def said(value: Any) -> Any:
        if _unknown(value):
            return None
        return float(f"{value:.{digits}g}") if isinstance(value, float) else value

    return in_lines({one.name: [{key: said(v) for key, v in record.items()} for record in one.raw] for one in tables})


def in_lines(content: Mapping[str, Sequence[Raw]]) -> str:
    """JSON with one record in a line: a change shows line by line, and nothing is spent on indentation."""
    named = (
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(record, separators=(",", ":")) for record in records) + "\n]"
        for name, records in content.items()
    )
    return "{\n" + ",\n".join(named) + "\n}\n"


STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1a1a1a;
  background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p, li { max-width: 46rem; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
nav { font-size: .92rem; margin: 1rem 0 2rem; }
nav ol { columns: 2; padding-left: 1.4rem; margin: .3rem 0; }
a { color: #0b57a4; }
.data { font-size: .8rem; color: #666; margin: -.5rem 0 1rem; }
.table { overflow-x: auto; margin: .8rem 0 1rem; }
table { border-collapse: collapse; font-size: .84rem; line-height: 1.35; }
th { text-align: left; font-weight: 600; border-bottom: 1.5px solid #555; vertical-align: bottom; }
th, td { padding: .28rem .6rem .28rem 0; }
td { border-bottom: 1px solid #e6e6e6; vertical-align: top; font-variant-numeric: tabular-nums; }
.numbers td { white-space: nowrap; }
figure { margin: 1.2rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; }
figcaption { font-size: .88rem; color: #444; max-width: 46rem; }
@media print {
  @page { margin: 15mm; }
  body { font-size: 9.5pt; max-width: none; margin: 0; padding: 0; }
  nav ol { columns: 3; }
  a { color: inherit; text-decoration: none; }
  h2, h3 { break-after: avoid; }
  .table { overflow: visible; }
  table { font-size: 7pt; }
  th, td { padding: .2rem .45rem .2rem 0; }
  .wide table { font-size: 6.2pt; }
  .wide th, .wide td { padding-right: .28rem; }
  thead { display: table-header-group; }
  tr { break-inside: avoid; }
}
"""


def page(markdown: str, figures: Mapping[str, Figure], folder: Path) -> str:
    """The Markdown as one self-contained HTML page with a table of contents.

    Args:
        figures: by name; an image NAME.png of the Markdown is that figure's SVG.
        folder: where other images of the Markdown are looked for.
    """
    from markdown_it import MarkdownIt

    engine = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = engine.parse(markdown)
    title, contents = "Study", []
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            text = "".join(child.content for child in tokens[place + 1].children or [])
            if token.tag == "h1":
                title = text
            elif token.tag == "h2":
                anchor = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
                token.attrSet("id", anchor)
                contents.append(f'<li><a href="#{anchor}">{html.escape(text)}</a></li>')
        for child in token.children or []:
            if child.type == "image":
                child.attrSet("src", _inlined(str(child.attrGet("src")), figures, folder))
    body = engine.renderer.render(tokens, engine.options, {})
    body = re.sub(r'<p>(<img [^>]*alt="([^"]*)"[^>]*>)</p>', r"<figure>\1<figcaption>\2</figcaption></figure>", body)
    body = body.replace("<p>Data: ", '<p class="data">Data: ')
    body = re.sub(r"<table>(.*?)</table>", _framed, body, flags=re.DOTALL)
    head, end, rest = body.partition("</h1>")
    listed = f"<nav><strong>Contents</strong><ol>{''.join(contents)}</ol></nav>"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n{head}{end}\n{listed}\n{rest}\n</body></html>\n"
    )


def _framed(found: "re.Match[str]") -> str:
    longest = max((len(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", found[1], re.DOTALL)), default=0)
    kind = "table numbers" if longest < 40 else "table"  # a table of numbers keeps each on one line
    kind += " wide" if found[1].count("<th") > 12 else ""
    return f'<div class="{kind}"><table>{found[1]}</table></div>'


def _inlined(source: str, figures: Mapping[str, Figure], folder: Path) -> str:
    """A picture as a data URI; a source that is no file here stays as it is."""
    figure = figures.get(source.removesuffix(".png"))
    if figure is not None:
        return f"data:image/svg+xml;base64,{base64.b64encode(figure.svg).decode()}"
    path = folder / source
    kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".svg": "svg+xml"}
    if path.suffix.lower() in kinds and path.is_file():
        return f"data:image/{kinds[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return source
