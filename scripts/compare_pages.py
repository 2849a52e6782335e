"""Compares the notebooks' pages, as just printed, with those that are committed.

On the machine that printed them they are the same bytes. Another CPU sums in another order, and a training carries that
into the last printed digits: so numbers may differ by 3 % (or in their last digit), and everything else must be equal.
"""

import re
import subprocess
import sys

FOLDERS = ["notebooks-rs/pages", "notebooks-rs/ipynb"]
COLOUR = re.compile(r"#[0-9A-F]{6}\b")  # of a heat map's cell, whose number is compared
NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
TOLERANCE = 0.03


def git(*arguments):
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def agree(left, right):
    one, other = (float(text.replace("−", "-")) for text in (left, right))
    digits = min(len(text.split(".")[1]) if "." in text and "e" not in text else 0 for text in (left, right))
    return abs(one - other) <= max(TOLERANCE * max(abs(one), abs(other)), 1.01 * 10.0**-digits)


def difference(committed, printed):
    """The first difference that is not one of last digits, or None."""
    committed, printed = (COLOUR.sub("colour", text) for text in (committed, printed))
    if NUMBER.sub("#", committed) != NUMBER.sub("#", printed):
        for line, (left, right) in enumerate(zip(committed.splitlines(), printed.splitlines()), 1):
            if NUMBER.sub("#", left) != NUMBER.sub("#", right):
                return f"line {line} was {left[:200]!r} and is {right[:200]!r}"
        return "it has another number of lines"
    for left, right in zip(NUMBER.findall(committed), NUMBER.findall(printed)):
        if left != right and not agree(left, right):
            return f"the number {left} is now {right}"
    return None


def main():
    untracked = git("ls-files", "--others", "--exclude-standard", "--", *FOLDERS).split()
    if untracked:
        sys.exit(f"error: printed but not committed: {', '.join(untracked)}")
    changed = git("diff", "--name-only", "--", *FOLDERS).split()
    wrong = 0
    for path in changed:
        with open(path, encoding="utf-8") as file:
            found = difference(git("show", f"HEAD:{path}"), file.read())
        if found:
            wrong += 1
            print(f"error: {path}: {found}; hint: make notebooks prints the pages anew, commit them", file=sys.stderr)
    if changed and not wrong:
        print(f"{len(changed)} pages differ in last digits only, as on another CPU")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
