"""How fast the page of a run answers: `python3 benchmarks/look.py runs/demo`.

Starts `undertone look RUN`, switches one token after another off, and prints the median, least and most time from the question to
the whole answer, and the time from the page's address to its tokens and numbers. Standard library only.
"""

import argparse
import json
import statistics
import subprocess
import time
import urllib.request
from pathlib import Path

BINARY = Path(__file__).resolve().parent.parent / "target" / "release" / "undertone"


def ask(address, **question):
    body = json.dumps({"page": "bench", **question}).encode()
    request = urllib.request.Request(address + "ask", body, {"Content-Type": "application/json"})
    begun = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        first = json.loads(answer.readline())
        seconds = time.perf_counter() - begun
        for line in answer:
            first |= json.loads(line)
    return first, seconds, time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--toggles", type=int, default=30)
    arguments = parser.parse_args()
    server = subprocess.Popen([BINARY, "look", arguments.run], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = server.stdout.readline().strip()
        described, _, seconds = ask(address, ask="run")
        setting = {"student": described["students"][0]["name"], "user": described["questions"][0]}
        look, tokens, numbers = ask(address, ask="look", setting={**setting, "gate": "everywhere"})
        n = len(look["tokens"])
        print(f"{arguments.run}: {described['model']}, {n} tokens, {len(look['words'])} words")
        print(f"tokens {seconds + tokens:.3f} s and numbers {seconds + numbers:.3f} s after the address was printed")
        times = [ask(address, ask="look", setting={**setting, "gate": f"except:positions({at % n})"})[2] for at in range(arguments.toggles)]
        print(f"a token switched: median {1000 * statistics.median(times):.0f} ms ({1000 * min(times):.0f} to {1000 * max(times):.0f})")
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
