"""What `make docs` adds to the pages of docs/, as hooks of MkDocs: the pages at the root, the reference, the menu.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages. Links between them and docs/ are turned into links of the
site; a link to any other file of the repository becomes that file's path, for a site has no such file. The reference
has a page per room of the package, from its docstrings, found without importing anything.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "amclr_scale"
AT_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# The order of the menu; a page of docs/ that is named nowhere comes at the end of the guide.
GUIDE = (
    "own_photos", "data", "encoders", "objectives", "estimators", "similarity", "engine", "checkpoints", "large_runs",
    "clusters", "evaluation", "memory", "studies",
)  # fmt: skip
AT_THE_END = ("architecture", "contributing", "measurements", "memory_worked_examples")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def rooms() -> dict[str, list[str]]:
    """The package's rooms, each with its modules that have a docstring, as names to import."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        text = path.read_text("utf-8").lstrip()
        if not text.startswith(('"""', 'r"""')) or parts == ("__main__",):
            continue
        room = parts[0] if len(parts) > 1 else "amclr_scale"
        name = ".".join(("amclr_scale", *(part for part in parts if part != "__init__")))
        found.setdefault(room, []).append(name)
    return found


def site_address(target: str, page: str) -> str | None:
    """Where a link of a Markdown file leads on the site, relative to `page`; None: the site has no such file.

    Args:
        target: as written, relative to the file in the repository.
        page: the page's address among the site's sources, such as `studies/mini_amclr/report.md`.
    """
    if re.match(r"[a-z]+:|#", target):
        return target
    path, mark, anchor = target.partition("#")
    source = {page_: file for file, page_ in AT_THE_ROOT.items()}.get(page, f"docs/{page}")
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if file in AT_THE_ROOT:
        address = AT_THE_ROOT[file]
    elif file.startswith("docs/") and (ROOT / file).is_file():
        address = file.removeprefix("docs/")
    else:
        return None
    return posixpath.relpath(address, posixpath.dirname(page) or ".") + mark + anchor


def with_site_links(markdown: str, page: str) -> str:
    """A page's Markdown with its links as the site has them; code is left alone."""

    def turned(found: "re.Match[str]") -> str:
        address = site_address(found[3], page)
        if address is not None:
            return f"{found[1]}[{found[2]}]({address})"
        text, file = found[2], found[3].lstrip("./")
        return f"`{file}`" if text.strip("`") == file else f"{text} (`{file}`)"

    parts = re.split(r"(^```.*?^```|`[^`\n]+`(?!\]))", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if place % 2 else LINK.sub(turned, part) for place, part in enumerate(parts))


def reference_page(room: str, modules: list[str]) -> str:
    """The reference of one room."""
    title = f"# {room}" if room == "amclr_scale" else f"# amclr_scale.{room}"
    return "\n\n".join([title, *(f"::: {module}" for module in modules)]) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File  # of the extra `docs`, which nothing else needs

    for source, page in AT_THE_ROOT.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for room, modules in rooms().items():
        files.append(File.generated(config, f"reference/{room}.md", content=reference_page(room, modules)))
    config.nav = menu(sorted(file.src_uri for file in files if file.is_documentation_page()))
    return files


def menu(pages: list[str]) -> list[Any]:
    """The site's menu, which names every page once."""
    top = {page.removesuffix(".md") for page in pages if "/" not in page}
    last = [name for name in AT_THE_END if name in top]
    others = sorted(top - {*GUIDE, *last, "index", "changelog"})
    guide = [f"{name}.md" for name in (*(name for name in GUIDE if name in top), *others)]
    studies = [page for page in pages if page.startswith("studies/")]
    found = [page for page in studies if page.endswith("/report.md")]
    reference = [page for page in pages if page.startswith("reference/")]
    return [
        {"Home": "index.md"},
        {"Guide": guide},
        {"Studies": [{page.split("/")[1]: page} for page in found]},
        {"Develop": [f"{name}.md" for name in last] + ["changelog.md"]},
        {"Reference": [{page.split("/")[1].removesuffix(".md"): page} for page in reference]},
    ]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them."""
    return with_site_links(markdown, page.file.src_uri)
