"""Finds files of a crate that import each other in a circle, imports that run back up between its rooms, and files of
the library that name clap: only the command line does.

A reader of one file of a circle must read all of them. A crate's lib.rs lists its rooms from the bottom up: neighbouring
`mod` lines, or one `mod` with files in braces. A file imports from its own room and from rooms above it in that list.

Standard library.

    python3 scripts/check_circles.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND_LINE = re.compile(r"src/(main|cli|commands)(\.rs|/)")
CRATES = ["hooks/src", "analyses/src", "src", "notebooks-rs/src", "benchmarks/src", "fuzz/src"]


def modules(folder: Path) -> dict[str, Path]:
    """Each file by its module path, such as `commands::arms`, without tests and the crate's roots: these import everything."""
    paths = {"::".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.rs")}
    return {name: path for name, path in paths.items() if name not in {"lib", "main"} and path.stem != "tests"}


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


def rooms(root: Path) -> dict[str, int]:
    """Each module at the crate's root with the number of its room, in the order of lib.rs."""
    if not root.exists():
        return {}
    text = re.sub(r"//.*|^\s*#!?\[.*\]\n", "", root.read_text(), flags=re.MULTILINE)
    found, room, depth = {}, 0, 0
    for line in text.splitlines():
        declared = re.match(r"(?:pub(?:\(crate\))? )?mod (\w+)( \{|;)", line)
        if declared and depth == 0:
            room += declared[2] == " {"
            found[declared[1]] = room
        elif depth == 0:
            room += 1  # neighbours only are one room
        depth += line.count("{") - line.count("}")
    return found


def upward(graph: dict[str, set[str]], number: dict[str, int]) -> list[tuple[str, str]]:
    """The imports of a room that comes later."""
    room = lambda name: number.get(name.split("::")[0], 0)  # noqa: E731
    pairs = [(name, other) for name in sorted(graph) for other in sorted(graph[name])]
    return [(name, other) for name, other in pairs if room(other) > room(name)]


def main() -> None:
    broken = 0
    for crate in CRATES:
        graph = imports(ROOT / crate)
        for circle in circles(graph):
            broken += 1
            print(f"{crate}: a circle of {len(circle)} files")
            for name in circle:
                print(f"  {name} imports {', '.join(sorted(graph[name] & set(circle)))}")
        for name, other in upward(graph, rooms(ROOT / crate / "lib.rs")):
            broken += 1
            print(f"{crate}: {name} imports {other}, whose room comes after its own in lib.rs")
    for path in sorted((ROOT / "src").rglob("*.rs")):
        name = str(path.relative_to(ROOT))
        if re.search(r"\bclap\b", code(path)) and not COMMAND_LINE.match(name):
            broken += 1
            print(f"{name} names clap, and is no part of the command line")
    if broken:
        sys.exit(f"error: {broken} circles, imports that run back up, and files with clap; hint: move what both sides need into a file below them")
    print(f"no file of {', '.join(CRATES)} imports itself through others, or from a room above its own; clap is the command line's alone")


if __name__ == "__main__":
    main()
