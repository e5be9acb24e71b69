"""The rooms of the package and what imports what, as a picture: `python -m bench.rooms docs/pictures/rooms.svg`

A room stands above all that it imports. An arrow is left out where others lead the same way; one that goes up, in a
circle of rooms, is red. What is printed beside it: files, lines, and functions by their number of arguments.
"""

from __future__ import annotations

import argparse
import ast
import sys
from html import escape
from pathlib import Path

from bench.reach import imports_of, module_of, python_files

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, ACROSS, DOWN = 128, 30, 156, 84  # of a box, and from one to the next
TWO = ("trainers.loop", "trainers.ppo")  # rooms in a room
Edges = dict[str, set[str]]


def imports(root: Path = ROOT) -> Edges:
    """Map each room to those that it imports, but for the package's own names and what only holds files."""

    def of(module: str) -> str:
        first, *others = module.removeprefix("rlhf_fast.").split(".")
        deep = ".".join([first, *others[:1]])
        return deep if deep in TWO and (root / "rlhf_fast" / deep.replace(".", "/")).is_dir() else first

    files = {module_of(file, root): file for file in python_files(root / "rlhf_fast")}
    left_out = {"rlhf_fast", "rlhf_fast.demo", "rlhf_fast.trainers"}
    edges: Edges = {of(name): set() for name in files if name not in left_out}
    for name, file in files.items():
        for other in imports_of(file, name, files.keys()) - left_out:
            if name not in left_out and of(other) != of(name):
                edges[of(name)].add(of(other))
    return edges


def ranks(edges: Edges) -> dict[str, int]:
    """Give each room its height: above all that it imports, where there is no circle."""
    heights = dict.fromkeys(edges, 0)
    for _ in edges:
        for name in edges:
            lower = [heights[other] for other in edges[name] if name not in _reached(edges, other)]
            heights[name] = max([heights[name], *(height + 1 for height in lower)])
    return heights


def _reached(edges: Edges, start: str) -> set[str]:
    reached: set[str] = set()
    left = [start]
    while left:
        for other in edges[left.pop()] - reached:
            reached.add(other)
            left.append(other)
    return reached


def needed(edges: Edges) -> Edges:
    """Drop the arrows that follow from others."""
    return {
        name: {
            other
            for other in others
            if not any(other in _reached(edges, by) for by in others if by not in (name, other))
        }
        for name, others in edges.items()
    }


def picture(edges: Edges, title: str) -> str:
    """An SVG."""
    height, rows = ranks(edges), dict[int, list[str]]()
    for name in sorted(edges):
        rows.setdefault(height[name], []).append(name)
    widest = max(map(len, rows.values()))
    place = {
        # No two rows begin alike, or a straight arrow would pass behind a box.
        name: (20 + 37 * rank % ACROSS + ACROSS * (i + (widest - len(row)) // 2), 50 + DOWN * (max(rows) - rank))
        for rank, row in rows.items()
        for i, name in enumerate(row)
    }
    size = 20 + ACROSS * (widest + 1), 60 + DOWN * (max(rows) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" font-family="sans-serif">',
        f'<rect width="100%" height="100%" fill="#ffffff"/><text x="20" y="28" font-size="16">{escape(title)}</text>',
        '<defs><marker id="end" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="context-stroke"/></marker></defs>',
    ]
    for name, others in sorted(needed(edges).items()):
        for other in sorted(others):
            (x, y), (to_x, to_y) = place[name], place[other]
            up = to_y <= y
            begin, end = (y, to_y + HEIGHT) if up else (y + HEIGHT, to_y)
            colour, middle = ("#cf222e" if up else "#8c959f"), (begin + end) / 2
            parts.append(
                f'<path d="M{x + WIDTH / 2:.0f},{begin:.0f} C{x + WIDTH / 2:.0f},{middle:.0f} {to_x + WIDTH / 2:.0f},'
                f'{middle:.0f} {to_x + WIDTH / 2:.0f},{end:.0f}" fill="none" stroke="{colour}" marker-end="url(#end)">'
                f"<title>{escape(name)} imports {escape(other)}</title></path>"
            )
    for name, (x, y) in sorted(place.items()):
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ddf4ff" stroke="#0969da"/>'
            f'<text x="{x + WIDTH / 2:.0f}" y="{y + 20:.0f}" font-size="13" text-anchor="middle">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def measures(root: Path = ROOT) -> str:
    """Files, lines, and how many functions take how many arguments."""
    files = python_files(root / "rlhf_fast")
    counts = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                counts.append(len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs))
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    return (
        f"{len(files)} files, {lines} lines, {len(counts)} functions: at most {max(counts)} arguments, "
        f"{sum(count > 10 for count in counts)} with more than ten"
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the SVG")
    parser.add_argument("--root", type=Path, default=ROOT, help="of a checkout, perhaps of another commit")
    parser.add_argument("--title", default="Rooms: each imports only what stands below it")
    given = parser.parse_args(words)
    given.out.write_text(picture(imports(given.root), given.title), encoding="utf-8")
    print(measures(given.root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
