"""Draw the rooms of the package and what they import, from the import graph, and fill in docs/architecture.md's table.

    python tools/draw_architecture.py

An edge that follows from others is left out. What a room does is read from that table.
"""

import argparse
import math
import re
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
Edges = dict[str, set[str]]


def imports() -> Edges:
    """Which rooms each room imports, by the modules in them."""
    import grimp

    sys.path.insert(0, str(ROOT))  # this checkout, whichever is installed
    graph = grimp.build_graph("amclr_scale", cache_dir=None)
    found: Edges = {}
    for module in graph.modules:
        room = _room(module)
        if room:
            imported = {_room(name) for name in graph.find_modules_directly_imported_by(module)}
            found.setdefault(room, set()).update(imported - {room, ""})
    return found


def _room(module: str) -> str:
    """The room of a module; none for the package itself and its command line's start."""
    _, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return "" if room == "__main__" else room


def reduced(edges: Edges) -> Edges:
    """Without the edges that follow from others."""

    def reach(start: str) -> set[str]:
        return {start}.union(*(reach(room) for room in edges[start]))

    return {
        room: {one for one in below if not any(one in reach(other) for other in below - {one})}
        for room, below in edges.items()
    }


def levels(edges: Edges) -> dict[str, int]:
    """The height of each room: one above the highest room that it imports."""
    found: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in found:
            found[room] = 1 + max((height(below) for below in edges[room]), default=-1)
        return found[room]

    for room in edges:
        height(room)
    return found


def purposes() -> dict[str, str]:
    """What each room does, and of what it stands on, from the page's table."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    return {room: what.replace("`", "") for room, what in rows}


@dataclass(frozen=True)
class Layout:
    """Where rooms are drawn, and the points that the arrow of an import runs through."""

    centres: dict[str, tuple[float, float]]
    paths: list[list[tuple[float, float]]]


BOX, BEND = (2.6, 0.72), 0.4  # a room's width and height; what an arrow takes that passes between rooms


def lay_out(edges: Edges) -> Layout:
    """Rooms of one height side by side, in an order in which few arrows cross; long arrows run between rooms."""
    height = levels(edges)
    rows: list[list[str]] = [[] for _ in range(max(height.values()) + 1)]
    for room in sorted(edges):
        rows[height[room]].append(room)
    routes, links = [], list[tuple[str, str]]()
    for room in sorted(edges):
        for below in sorted(edges[room]):
            bends = [f"{room}>{below}>{level}" for level in range(height[room] - 1, height[below], -1)]
            for level, bend in zip(range(height[room] - 1, height[below], -1), bends, strict=True):
                rows[level].append(bend)
            route = [room, *bends, below]
            routes.append(route)
            links += pairwise(route)
    above, beneath = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for upper, lower in links:
        above[lower].append(upper)
        beneath[upper].append(lower)
    x = {name: float(place) for row in rows for place, name in enumerate(row)}
    for sweep in range(24):
        upwards = sweep % 2 == 0
        for row in rows if upwards else reversed(rows):
            near = beneath if upwards else above
            wish = {name: fmean([x[one] for one in near[name]] or [x[name]]) for name in row}
            row.sort(key=wish.__getitem__)
            _spread(row, wish, x)
    points = {name: (x[name], 1.2 * level) for level, row in enumerate(rows) for name in row}
    return Layout({room: points[room] for room in edges}, [[points[name] for name in route] for route in routes])


def _spread(row: list[str], wish: dict[str, float], x: dict[str, float]) -> None:
    """Put a row's names where they wish to be, as near as their widths allow."""
    width = {name: BEND if ">" in name else BOX[0] + 0.3 for name in row}
    edge, starts = 0.0, {}
    for name in row:
        starts[name] = edge + width[name] / 2
        edge += width[name]
    for _ in range(3):  # from both ends, and the middle between the two
        left, right, at = dict[str, float](), dict[str, float](), -math.inf
        for name in row:
            left[name] = max(wish[name], at + width[name] / 2)
            at = left[name] + width[name] / 2
        at = math.inf
        for name in reversed(row):
            right[name] = min(wish[name], at - width[name] / 2)
            at = right[name] - width[name] / 2
        wish = {name: (left[name] + right[name]) / 2 for name in row}
    shift = fmean(wish[name] - starts[name] for name in row)
    tight = all(wish[b] - wish[a] >= (width[a] + width[b]) / 2 - 1e-6 for a, b in pairwise(row))
    x.update({name: wish[name] if tight else starts[name] + shift for name in row})


def draw(edges: Edges, file: Path) -> None:
    """The picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Curve

    from amclr_scale.study.report.compact import palette_png

    layout, what = lay_out(edges), purposes()
    wide, high = BOX
    across = [x for path in layout.paths for x, _ in path]
    left, right = min(across), max(across)
    top = max(y for _, y in layout.centres.values())
    figure, axes = plt.subplots(figsize=(1.05 * (right - left + wide + 0.4), 1.05 * (top + 1)))
    for path in layout.paths:
        (x, y), *bends, (to_x, to_y) = path
        points, codes = [(x, y - high / 2)], [Curve.MOVETO]
        for end_x, end_y in (*bends, (to_x, to_y)):
            (last_x, last_y), end = points[-1], end_y + high / 2
            middle = (last_y + end) / 2
            points += [(last_x, middle), (end_x, middle), (end_x, end)]
            codes += [Curve.CURVE4] * 3
            if (end_x, end_y) != (to_x, to_y):  # straight down between two rooms
                points.append((end_x, end_y - high / 2))
                codes.append(Curve.LINETO)
        curve = Curve(points, codes)
        axes.add_patch(FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=9, linewidth=0.9, color="#7a8794"))
    for room, (x, y) in layout.centres.items():
        box = FancyBboxPatch(
            (x - wide / 2, y - high / 2), wide, high, boxstyle="round,pad=0.02,rounding_size=0.06",
            facecolor="#eef3f8", edgecolor="#35506b", linewidth=1.1, zorder=2,
        )  # fmt: skip
        axes.add_patch(box)
        centred = {"ha": "center", "va": "center", "zorder": 3}
        axes.text(x, y + 0.22, room, fontsize=10, fontweight="bold", **centred)
        axes.text(x, y - 0.1, textwrap.fill(what[room], 42), fontsize=6.4, **centred)
    axes.set_xlim(left - wide / 2 - 0.2, right + wide / 2 + 0.2)
    axes.set_ylim(-0.5, top + 0.5)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    file.write_bytes(palette_png(file.read_bytes()))


def with_imports(page: str, edges: Edges) -> str:
    """The page with what the rooms in its table stand on. A room without a row, or a row without a room, stays so."""

    def row(found: "re.Match[str]") -> str:
        below = ", ".join(f"`{one}`" for one in sorted(edges.get(found[1], ())))
        return f"| `{found[1]}` | {found[2]} | {below}{' ' * bool(below)}|"

    return re.sub(r"^\| `(\w+)` \| (.*?) \| (?:`.*` )?\|$", row, page, flags=re.MULTILINE)


def main() -> None:
    """Draw, and write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    edges = reduced(imports())
    PAGE.write_text(with_imports(PAGE.read_text("utf-8"), edges), "utf-8")
    if missing := edges.keys() - purposes().keys():
        raise SystemExit(f"{PAGE}: expected a row for {', '.join(sorted(missing))}")
    draw(edges, PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
