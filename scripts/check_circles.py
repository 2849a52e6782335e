"""Finds files of a crate that import each other in a circle, and prints each circle with its imports.

A reader of one such file must read all of them.

Standard library.

    python3 scripts/check_circles.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CRATES = ["hooks/src", "analyses/src", "src", "notebooks-rs/src", "benchmarks/src", "fuzz/src"]


def modules(folder: Path) -> dict[str, Path]:
    """Each file by its module path, such as `commands::arms`; the crate's roots import everything and are left out."""
    paths = {"::".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.rs")}
    return {name: path for name, path in paths.items() if name not in {"lib", "main"}}


def code(path: Path) -> str:
    """The text without comments and without the tests at its end."""
    text = path.read_text().split("\n#[cfg(test)]\n")[0]
    return re.sub(r"//.*", "", text)


def used(text: str) -> list[str]:
    """Every path that begins with `crate` or `super`, with braces multiplied out."""
    found = []
    for start, rest in re.findall(r"\b(crate|super)::((?:[\w:]|\{[^;]*?\})+)", text):
        head, brace, inside = rest.partition("{")
        parts = re.findall(r"[\w:]+", inside) if brace else [""]
        found += [f"{start}::{head}{part}".rstrip(":") for part in parts]
    return found


def imports(folder: Path) -> dict[str, set[str]]:
    known = modules(folder)
    root = folder / "lib.rs"
    public = {}  # each name at the crate's root, with its module
    for path in re.findall(r"pub use ([\w:]+(?:\{[^}]*\})?);", root.read_text() if root.exists() else ""):
        module, brace, names = path.partition("{")
        for name in re.findall(r"\w+", names) if brace else [path.split("::")[-1]]:
            public[name] = module.rstrip(":") if brace else "::".join(path.split("::")[:-1])
    graph = {}
    for name, path in known.items():
        found = set()
        for path_used in used(code(path)):
            start, *parts = path_used.split("::")
            base = [] if start == "crate" else name.split("::")[:-1]
            parts = base + parts
            if parts and parts[0] in public:
                parts = public[parts[0]].split("::")
            longest = [n for n in range(len(parts), 0, -1) if "::".join(parts[:n]) in known][:1]
            found |= {"::".join(parts[:n]) for n in longest}
        # A folder's file lists the files in it as a table of contents; that does not count as an import.
        graph[name] = {other for other in found if other != name and not other.startswith(f"{name}::")}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one file."""
    reach = {}
    for start in graph:
        seen, left = set(), [start]
        while left:
            for other in graph[left.pop()] - seen:
                seen.add(other)
                left.append(other)
        reach[start] = seen
    found = {tuple(sorted({name} | {other for other in reach[name] if name in reach[other]})) for name in graph}
    return [list(circle) for circle in sorted(found) if len(circle) > 1]


def main() -> None:
    broken = 0
    for crate in CRATES:
        graph = imports(ROOT / crate)
        for circle in circles(graph):
            broken += 1
            print(f"{crate}: a circle of {len(circle)} files")
            for name in circle:
                print(f"  {name} imports {', '.join(sorted(graph[name] & set(circle)))}")
    if broken:
        sys.exit(f"error: {broken} circles; hint: move what both sides need into a file below them")
    print(f"no file of {', '.join(CRATES)} imports itself through others")


if __name__ == "__main__":
    main()
