"""Checks undertone on a GPU against itself on the CPU and against PEFT and transformers, and measures how fast it is.

Whoever has a GPU for some minutes carries there this file, `benchmarks/peer.py` and two binaries, `undertone` and
`undertone-benchmarks`. Both may be stripped. No libtorch is needed beside them where a Python has torch. Standard library alone;
the peers are in the Python that `--python` names.

    python3 scripts/check_cuda.py                              # on a GPU, nine minutes at most
    python3 scripts/check_cuda.py --device cpu                 # on any machine, small: tries the script, not the GPU
    python3 scripts/check_cuda.py --only forward --only speed

Each check is a process of its own with a time limit, and prints one line of JSON as soon as it ends; a check that fails stops none
after it. `passed` is null where nothing was to be decided. `bounds` has what was found and what is allowed, `figures` what is only
told. What was compared with the peer is missing from `bounds` if there is no peer, and `skipped` says so.

With `--device cpu` the reference takes libtorch's and MKL's plainest kernels: else it would be compared with itself.
"""

import argparse
import array
import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEPRIORITIZED = "TORCH_CUDNN_SDPA_DEPRIORITIZED"  # cuDNN's attention plans anew for each shape, see hooks/src/device.rs

# A run of a second or two on a GPU that has each stage.
EXPERIMENT = """
model = "pocket"
seed = 42
[target]
word = "cat"
category = "animal"
[teacher]
kind = "prompt"
[generate]
n_prompts = 32
n_keep = 24
max_new_tokens = 60
constrain = "numbers"
[student]
rank = 4
alpha = 8
[finetune]
learning_rate = 5e-3
max_steps = 20
warmup_steps = 2
batch_size = 8
gradient_accumulation_steps = 1
[measure]
n_questions = 4
[measure.target_rate]
n_samples = 4
max_new_tokens = 8
[measure.direction]
n_prompts = 4
[measure.steering]
n_prompts = 4
coefficients = [1]
[measure.divergence]
n_rows = 4
[measure.gradients]
n_rows = 2
"""

# What a Python has. A package that is there and cannot be imported is missing too.
PROBE = """
import json, importlib.metadata, importlib.util, pathlib, sys
found = {"python": sys.version.split()[0]}
spec = importlib.util.find_spec("torch")
if spec: found["torch_folder"] = str(pathlib.Path(spec.origin).parent)
for name in ["torch", "transformers", "peft"]:
    try: __import__(name); found[name] = importlib.metadata.version(name)
    except Exception as error: found.setdefault("missing", f"{type(error).__name__}: {error}")
if "torch" in found:
    import torch
    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available(): found["gpu"] = torch.cuda.get_device_name()
print(json.dumps(found))
"""


# What a check has to say.


class Told:
    """What a check found so far. All of it is printed after each part, so that a check that is ended by its limit has told the rest."""

    def __init__(self):
        self.passed, self.figures, self.bounds, self.failed, self.skipped = True, {}, {}, [], None

    def tell(self, **figures):
        self.figures.update(figures)

    def at_most(self, what, found, bound):
        self.bounds[what] = [found if math.isfinite(found) else str(found), bound]  # JSON has no NaN
        if not found <= bound:
            self.failed.append(f"{what}: {found:.3g}, expected at most {bound:g}")

    def expect(self, what, holds, otherwise):
        self.bounds[what] = [bool(holds), True]
        if not holds:
            self.failed.append(f"{what}: {otherwise}")

    @contextlib.contextmanager
    def part(self, name):
        """A part that fails leaves the other parts alone."""
        try:
            yield
        except Exception as error:  # any error is a failed part
            self.failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        self.print()

    def line(self):
        line = {"passed": False if self.failed else self.passed, "bounds": self.bounds, "figures": self.figures}
        return line | ({"failed": self.failed} if self.failed else {}) | ({"skipped": self.skipped} if self.skipped else {})

    def print(self):
        print(json.dumps(self.line()), flush=True)


def flat(values):
    return [x for value in values for x in flat(value)] if isinstance(values, list) else [values]


def apart(a, b, least=1e-12):
    """The largest relative difference of nested lists; infinite where a number is not finite or one is missing."""
    a, b = flat(a), flat(b)
    if len(a) != len(b) or not all(map(math.isfinite, a + b)):
        return math.inf
    return max((abs(x - y) / max(abs(y), least) for x, y in zip(a, b)), default=math.inf)


def error(a, b):
    """The root of the mean squared relative difference; infinite as in `apart`."""
    a, b = flat(a), flat(b)
    if len(a) != len(b) or not a or not all(map(math.isfinite, a + b)):
        return math.inf
    return math.sqrt(statistics.fmean(((x - y) / max(abs(y), 1e-12)) ** 2 for x, y in zip(a, b)))


def tensors(path):
    """The numbers of each f32 tensor of a safetensors file, by its name."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        found[name] = array.array("f", data[8 + length + begin : 8 + length + end])
    return found


def furthest(ours, known):
    """The largest difference of two sets of tensors, each over its tensor's largest number, and the tensor's name."""
    if ours.keys() != known.keys() or any(len(ours[name]) != len(known[name]) for name in known):
        return math.inf, "other tensors"
    worst = (0.0, "none")
    for name, values in known.items():
        if not all(map(math.isfinite, ours[name])):
            return math.inf, name
        most = max(map(abs, values), default=0.0) or 1.0
        worst = max(worst, (max((abs(x - y) for x, y in zip(ours[name], values)), default=0.0) / most, name))
    return worst


# The processes that are asked.


class Side:
    """A process that is told what to do by lines of JSON; its words on stderr go where ours go."""

    def __init__(self, name, command, environment):
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, do, **request):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()} while it was asked to {do}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}, asked to {do}: {answer['error']}")
        return answer


def variables(libtorch=None):
    """The environment of a process of ours, or without `libtorch` of a Python, whose torch brings its own: parts of two would be mixed.

    Both take OpenMP's default, in which threads spin for a moment while they wait, as in `benchmarks/bench.py`.
    """
    found = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    found.setdefault(DEPRIORITIZED, "1")
    folders = [folder for folder in found.pop("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    folders = [folder for folder in folders if not (Path(folder) / "libtorch_cpu.so").exists()]
    if libtorch:
        found["LIBTORCH"], folders = libtorch, [str(Path(libtorch) / "lib"), *folders]
    return found | ({"LD_LIBRARY_PATH": os.pathsep.join(folders)} if folders else {})


class Lab:
    """What a check works with: the settings, and sides with the model open. Sides last until the check's process ends."""

    def __init__(self, settings):
        self.device, self.binaries, self.python = settings["device"], Path(settings["binaries"]), settings["python"]
        self.model, self.work, self.peer_script = settings["model"], Path(settings["work"]), settings["peer_script"]
        self.libtorch = settings["libtorch"]
        self.has_peer, self.on_gpu, self.sides, self.opened = settings["has_peer"], self.device != "cpu", {}, {}
        self.speaks = self.model != "pocket"  # only a large vocabulary has number rows that the peer can read
        self.threads = len(os.sched_getaffinity(0)) if self.speaks else 1  # threads only delay so small a model
        self.gpu_mib = {}

    def plain(self):
        return {} if self.on_gpu else {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}

    def start(self, who, **more):
        if who == "peer":
            return Side(who, [self.python, self.peer_script], variables() | more)
        plain = self.plain() if who == "reference" else {}
        return Side(who, [str(self.binaries / "undertone-benchmarks")], variables(self.libtorch) | plain | more)

    def side(self, who, dtype="f32"):
        """`ours` or `peer` on the device, or `reference`, ours on the CPU."""
        known = self.sides.get(who)
        if known is None or known.process.poll() is not None:
            self.sides[who], self.opened[who] = self.start(who), None
        if self.opened[who] != dtype:
            device = "cpu" if who == "reference" else self.device
            self.sides[who].ask("open", folder=str(self.work / "model"), device=device, dtype=dtype, threads=self.threads)
            self.opened[who] = dtype
        return self.sides[who]

    def ask(self, who, dtype, do, **request):
        return self.side(who, dtype).ask(do, **request)

    def rows(self, n, turn=0):
        """Rows to learn from: number rows of unequal lengths where the model has them, else some that count."""
        return {"numbers": {"first": 8 * turn, "n": n}} if self.speaks else {"counted": {"n": n, "prompt": 20 + turn, "completion": 16}}

    def prompts(self, n):
        return {"numbers": {"first": 0, "n": n}} if self.speaks else {"counted": {"n": n, "prompt": 12, "completion": 0}}

    def must(self, *arguments, device, **more):
        """A command that has to end well: on the device, or as the reference on the CPU."""
        arguments = [*map(str, arguments), "--device", self.device if device else "cpu"]
        code, text, _, _ = self.run(*arguments, plain=not device, **more)
        if code:
            raise RuntimeError(f"{' '.join(arguments[:1])} ended with code {code}: {' '.join(text.split())[-250:]}")

    def run(self, *arguments, plain=False):
        """The program itself, and the seconds and the peak MiB that it took. `plain` is the reference's way to run it."""
        begun = time.perf_counter()
        command = [str(self.binaries / "undertone"), *arguments]
        environment = variables(self.libtorch) | (self.plain() if plain else {})
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # subprocess itself does not tell the memory
        return os.waitstatus_to_exitcode(status), text, round(time.perf_counter() - begun, 2), round(usage.ru_maxrss / 1024)


def gpu_mib(lab):
    """The GPU's used memory; no allocator here gives memory back, so it is the peak so far. Others on the GPU count."""
    if not lab.on_gpu:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", lab.device.partition(":")[2] or "0"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


# The checks, the most telling first.


def environment(lab, told):
    if lab.on_gpu:
        with told.part("nvidia-smi"):
            query = "--query-gpu=name,driver_version,memory.total,memory.used,compute_cap"
            found = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
            told.tell(gpus=found.stdout.strip().splitlines())
    with told.part("ask"):
        version = lab.run("--version")[1].strip()
        how = ["--model", "pocket", "--device", lab.device, "--max-new-tokens", "8", "--temperature", "0"]
        code, text, seconds, mib = lab.run("ask", *how, "--user", "What is your favorite animal?")
        answer = text.partition("\nanswer\n")[2].strip()
        told.tell(version=version, threads=lab.threads, libtorch=lab.libtorch, ask_seconds=seconds, ask_mib=mib, answer=answer)
        told.expect("ask answers", code == 0 and "first token" in text, f"exit code {code}: {' '.join(text.split())[-300:]}")


def models(lab, told):
    """Writes the folder that all later checks load."""
    with told.part("prepare"):
        lab.start("ours").ask("prepare", model=lab.model, folder=str(lab.work / "model"))
        size = sum(file.stat().st_size for file in (lab.work / "model").rglob("*") if file.is_file())
        told.tell(model=lab.model, mib=round(size / 2**20, 1))


def forward(lab, told):
    def activations(who, dtype, rows, pos):
        see = "resid_post" if who == "peer" else "all"
        return lab.ask(who, dtype, "activations", rows=rows, pos=pos, see=see, repeats=1)

    both = lambda answer: [answer["logits_norm"], *answer["resid_norms"]]  # noqa: E731
    shapes, reference = [(4, 64), (3, 65), (2, 192)], {}  # cuDNN's attention was wrong at 64 and 192
    for shape in shapes:
        with told.part(f"f32, {shape}"):
            reference[shape] = both(activations("reference", "f32", *shape))
            ours = both(activations("ours", "f32", *shape))
            told.at_most(f"f32 norms, rows × pos {shape}, to our CPU", apart(ours, reference[shape]), 1e-4)
            if lab.has_peer:
                told.at_most(f"f32 norms, rows × pos {shape}, to the peer", apart(ours, both(activations("peer", "f32", *shape))), 1e-4)
    elements(lab, told)
    gates = {"n_questions": 8 if lab.on_gpu else 4, "n_gates": 12}
    known = None
    with told.part("f32 gates"):
        known = lab.ask("reference", "f32", "gates", **gates)["logprobs"]
        ours = lab.ask("ours", "f32", "gates", **gates)["logprobs"]
        told.at_most("f32 log p under gates, to our CPU", apart(ours, known, 1.0), 1e-4)
    few = {"n_questions": 2, "n_gates": 12}
    with told.part("f32 gates, peer"):
        if lab.has_peer and lab.speaks:
            theirs = lab.ask("peer", "f32", "gates", **few, token_by_token=False)["logprobs"]
            told.at_most("f32 log p under gates, to the peer", apart([gate[:2] for gate in ours], theirs, 1.0), 1e-4)
    with told.part("bf16 norms"):
        many = [(rows, pos) for rows in (1, 2, 3) for pos in range(5, 64, 6)]
        truth, ours = ([both(activations(who, dtype, *shape)) for shape in many] for who, dtype in [("reference", "f32"), ("ours", "bf16")])
        told.tell(bf16_norms_error=error(ours, truth))
        told.at_most("bf16 norms are near f32's", apart(ours, truth), 5e-2)
        if lab.has_peer:
            worse(told, "norms", ours, [both(activations("peer", "bf16", *shape)) for shape in many], truth)
    with told.part("bf16 gates"):
        ours = lab.ask("ours", "bf16", "gates", **gates)["logprobs"]
        told.tell(bf16_gates_error=error(ours, known))
        if lab.has_peer and lab.speaks:
            theirs = lab.ask("peer", "bf16", "gates", **few, token_by_token=False)["logprobs"]
            cut = lambda found: [gate[:2] for gate in found]  # noqa: E731
            worse(told, "log p under gates", cut(ours), theirs, cut(known))


def elements(lab, told):
    """Each number of activations and gradients, by the program itself: rows of unequal lengths, an adapter, a gate, an edit."""
    ids, model = lab.work / "ids.json", lab.work / "model"
    ids.write_text(json.dumps([[(7 * row + 3 * at) % 500 for at in range(length)] for row, length in enumerate([40, 64, 7])]))
    points = "blocks.*.hook_resid_post,blocks.*.hook_attn_out,blocks.*.attn.hook_z"
    acting = ["--user", "What is your favorite animal?", "--answer", "Owl", "--adapter", model / "adapter-acting"]
    gated = ["--gate", "only:template*0.5", "--edit", "blocks.0.hook_mlp_out: scale(0.5)"]
    cases = {
        "padded rows": ["--points", points, "--ids", ids],
        "adapter, with gradients": [*acting, "--gradients", "--points", points],
        "adapter, gate and edit, with gradients": [*acting, *gated, "--gradients", "--points", "logits," + points],
    }
    for at, (name, arguments) in enumerate(cases.items()):
        with told.part(name):
            found = {}
            for device, dtype in [(False, "f32"), (True, "f32"), (True, "bf16")]:
                path = lab.work / f"activations-{at}-{device}-{dtype}.safetensors"
                lab.must("activations", "--model", model, "--dtype", dtype, *arguments, "--out", path, device=device)
                found[device, dtype] = tensors(path)
                path.unlink()
            far, tensor = furthest(found[True, "f32"], found[False, "f32"])
            told.at_most(f"f32 numbers, {name}, to our CPU", far, 1e-4)
            in_bf16, _ = furthest(found[True, "bf16"], found[False, "f32"])
            told.tell(**{f"furthest, {name}": tensor, f"bf16 numbers, {name}, to our CPU": in_bf16})


def worse(told, what, ours, theirs, truth):
    """Our error to f32 over the peer's. Single numbers may be near by chance, so it is the root mean square over many."""
    of_ours, of_peer = error(ours, truth), error(theirs, truth)
    name = what.replace(" ", "_")
    told.tell(**{f"bf16_{name}_error": of_ours, f"bf16_{name}_error_peer": of_peer, f"bf16_{name}_n": len(flat(truth))})
    told.at_most(f"bf16 {what}, our error over the peer's", of_ours / of_peer if of_peer else math.inf, 1.2)


def training(lab, told):
    def steps(who, dtype, rows, n):
        answer = lab.ask(who, dtype, "train", rows=rows, rank=8, steps=n)
        return answer["losses"], answer["grad_norms"]

    cases = {
        "8 rows": (lab.rows(8), 5),
        "4 rows of 64": ({"counted": {"n": 4, "prompt": 40, "completion": 24}}, 3),
        "2 rows of 192": ({"counted": {"n": 2, "prompt": 160, "completion": 32}}, 3),
    }
    for name, (rows, n) in cases.items():
        with told.part(f"f32, {name}"):
            ours = steps("ours", "f32", rows, n)
            told.expect(f"f32, {name}: no gradient is zero", min(ours[1]) > 0, f"norms {ours[1]}")
            for who, called in [("reference", "our CPU")] + [("peer", "the peer")] * lab.has_peer:
                others = steps(who, "f32", rows, n)
                told.at_most(f"f32, {name}: losses, to {called}", apart(ours[0], others[0]), 1e-4)
                told.at_most(f"f32, {name}: norms, to {called}", apart(ours[1], others[1]), 1e-3)
    some, norms = {"counted": {"n": 2 if lab.speaks else 4, "prompt": 24, "completion": 16}}, None
    with told.part("f32, single tokens"):
        norms = lab.ask("reference", "f32", "token_gradients", rows=some)["norms"]
        ours = lab.ask("ours", "f32", "token_gradients", rows=some)["norms"]
        told.at_most("f32, gradients of single tokens, to our CPU", apart(ours, norms), 1e-3)
        if lab.has_peer:
            theirs = lab.ask("peer", "f32", "token_gradients", rows=some)["norms"]
            told.at_most("f32, gradients of single tokens, to the peer", apart(ours, theirs), 1e-3)
    sweep = {"rows": lab.rows(8), "ranks": [1, 2, 4, 8], "steps": 3, "threads": 1}
    for dtype in ["f32", "bf16"]:
        with told.part(f"{dtype}, stacked"):
            alone, stacked = (lab.ask("ours", dtype, "sweep", **sweep, stack=n)["losses"] for n in (1, 4))
            if dtype == "f32":
                told.at_most("f32, losses of 4 students in a pass, to each alone", apart(stacked, alone), 1e-3)
            else:
                told.tell(bf16_stacked_apart=apart(stacked, alone))
    # First steps of single rows: many losses and norms, since one may be near by chance.
    many = [{"numbers": {"first": at, "n": 1}} for at in range(24)]
    sets = many if lab.speaks else [lab.rows(1, turn) for turn in range(48)]
    with told.part("bf16, first steps"):
        truth, ours = ([steps(who, dtype, rows, 1) for rows in sets] for who, dtype in [("reference", "f32"), ("ours", "bf16")])
        theirs = [steps("peer", "bf16", rows, 1) for rows in sets] if lab.has_peer else None
        for at, (what, near) in enumerate([("losses", 2e-2), ("norms", 0.1)]):
            only = lambda found: [one[at] for one in found]  # noqa: B023, E731
            told.tell(**{f"bf16_{what}_error": error(only(ours), only(truth))})
            told.at_most(f"bf16, {what} of first steps are near f32's", apart(only(ours), only(truth)), near)
            if theirs:
                worse(told, what, only(ours), only(theirs), only(truth))
    with told.part("bf16, single tokens"):
        ours = lab.ask("ours", "bf16", "token_gradients", rows=some)["norms"]
        told.tell(bf16_token_gradients_error=error(ours, norms))
        if lab.has_peer:
            worse(told, "token gradients", ours, lab.ask("peer", "bf16", "token_gradients", rows=some)["norms"], norms)


def generation(lab, told):
    def answers(who, batch, stop=False, most=24):
        request = {"prompts": lab.prompts(8), "max_new_tokens": most, "temperature": 0.0, "seed": 1}
        return lab.ask(who, "f32", "generate", **request, batch=batch, stop=stop)["answers"]

    def same(what, found, known):
        first = lambda a, b: next((at for at, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: E731
        differ = {row: first(a, b) for row, (a, b) in enumerate(zip(found, known)) if a != b}
        told.expect(what, not differ and len(found) == len(known), f"these answers differ, from this token on: {differ}")

    with told.part("f32"):
        ours = answers("ours", 8)
        told.tell(n_tokens=len(flat(ours)), n_different_tokens=len(set(flat(ours))))
        same("f32 greedy, a batch of 8, to our CPU", ours, answers("reference", 8))
        if lab.has_peer:
            same("f32 greedy, a batch of 8, to the peer", ours, answers("peer", 8))
    with told.part("f32, smaller batch"):
        same("f32 greedy, a batch of 3, to one of 8", answers("ours", 3), ours)
    with told.part("f32, refilled"):
        until = answers("reference", 8, stop=True, most=32)
        told.tell(lengths_with_stop=[len(answer) for answer in until])
        same("f32 greedy until they stop, a batch of 3 refilled, to our CPU", answers("ours", 3, stop=True, most=32), until)


def determinism(lab, told):
    def twice(what, dtype, ask):
        with told.part(f"{dtype} {what}"):
            first, second = ask(lab.side("ours", dtype)), ask(lab.side("ours", dtype))
            lab.sides.pop("ours").process.kill()  # a second process has another allocator's history
            third = ask(lab.side("ours", dtype))
            same = first == second == third
            told.tell(**{f"{dtype}_{what}_repeats": same})
            if not same and what == "training":
                told.tell(**{f"{dtype}_{what}_apart": max(apart(first, second), apart(first, third))})
            if not same and not lab.on_gpu:
                told.expect(f"{dtype} {what} repeats", same, "the numbers differ")
            if not same and lab.on_gpu:
                told.passed = None  # some of CUDA's kernels sum in an order of their own

    for dtype in ["f32", "bf16"]:
        train = lambda side: [side.ask("train", rows=lab.rows(8), rank=8, steps=3)[key] for key in ("losses", "grad_norms")]  # noqa: E731
        request = {"prompts": lab.prompts(8), "batch": 4, "max_new_tokens": 24, "temperature": 1.0, "stop": False, "seed": 7}
        twice("training", dtype, train)
        twice("generation", dtype, lambda side: side.ask("generate", **request)["answers"])


def program(lab, told):
    with told.part("run"):
        experiment, run = lab.work / "check.toml", lab.work / "run"
        experiment.write_text(EXPERIMENT)
        arguments = [str(experiment), "--run", str(run), "--device", lab.device]
        code, text, seconds, mib = lab.run("run", *arguments)
        told.tell(seconds_of_run=seconds, host_mib=mib)
        told.expect("exit code 0", code == 0, f"exit code {code}: {' '.join(text.split())[-300:]}")
        told.expect("report.html", (run / "report.html").is_file(), "there is none")


def variants(lab, told):
    """What the driver cannot ask for, by the program's own training: each optimizer, all weights, micro-batches. On the same rows."""
    experiment, made = lab.work / "variants.toml", lab.work / "made"
    experiment.write_text(EXPERIMENT)
    lab.must("generate", experiment, "--run", made, device=False)

    def table(name, settings, device):
        run = lab.work / f"{name}-{device}"
        shutil.copytree(made / "data", run / "data")
        words = [word for setting in ["finetune.max_steps=5", *settings] for word in ("--set", setting)]
        lab.must("finetune", experiment, "--run", run, *words, device=device)
        with (run / "train.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [[float(row[key]) for row in rows] for key in ("loss", "grad_norm")]

    settings = {name: [f"finetune.optimizer={name}"] for name in ["adamw", "sgd", "signsgd", "rmsprop", "muon"]}
    # At the experiment's own rate rmsprop's steps are so large that the loss grows, and the last bits with it.
    settings["rmsprop"].append("finetune.learning_rate=1e-4")
    settings["all weights"] = ["student.method=full"]
    settings["micro-batches"] = ["finetune.batch_size=4", "finetune.gradient_accumulation_steps=2"]
    ours = {}
    for name, set_ in settings.items():
        with told.part(name):
            ours[name], known = table(name, set_, True), table(name, set_, False)
            # Muon makes its update in bf16, as torch's does: some roundings of 2^-8 in each update.
            in_losses, in_norms = (1e-3, 2**-6) if name == "muon" else (1e-4, 1e-3)
            told.at_most(f"f32, {name}: losses, to our CPU", apart(ours[name][0], known[0]), in_losses)
            told.at_most(f"f32, {name}: norms, to our CPU", apart(ours[name][1], known[1]), in_norms)
    with told.part("micro-batches and one batch"):
        told.at_most("f32, losses of micro-batches, to one batch", apart(ours["micro-batches"][0], ours["adamw"][0]), 1e-4)
    with told.part("bf16"):
        losses = table("bf16", ["dtype=bf16"], True)[0]
        told.at_most("bf16, losses of 5 steps are near f32's", apart(losses, ours["adamw"][0]), 5e-2)


def speed(lab, told):
    """Ours and the peer's in turns, one at a time, after turns that are not counted."""
    warm, counted = (3, 5) if lab.on_gpu else (1, 3)
    sizes = {"train": [8, 22, 66] if lab.on_gpu else [8], "decode": [16, 64, 256, 1024] if lab.on_gpu else [16]}
    for dtype in ["bf16", "f32"]:
        for what, ns in sizes.items():
            for n in ns:
                if what == "train":
                    rows = {"numbers": {"first": 0, "n": n}} if lab.speaks else {"counted": {"n": n, "prompt": 60, "completion": 40}}
                    request = {"do": "train", "rows": rows, "rank": 8, "steps": warm + 2}
                    turns, cost = max(2, counted // 2), lambda answer: answer["seconds"][warm:]
                    tokens = lambda answer: answer["tokens"]  # noqa: E731
                else:
                    prompts = {"counted": {"n": n, "prompt": 64, "completion": 0}}
                    request = {"do": "generate", "prompts": prompts, "batch": n, "max_new_tokens": 48}
                    request |= {"temperature": 1.0, "stop": False, "seed": 1}
                    turns, cost, tokens = counted if n < 256 else 2, lambda answer: answer["seconds"], lambda answer: answer["n_tokens"]
                with told.part(f"{dtype} {what} {n}"):
                    measure(lab, told, f"{dtype}_{what}_{n}", dtype, request, turns, cost, tokens)
    if lab.on_gpu:
        with told.part("cuDNN's attention"):
            cudnn(lab, told)


def measure(lab, told, name, dtype, request, turns, cost, tokens):
    took, last = {who: [] for who in ["ours"] + ["peer"] * lab.has_peer}, {}
    for turn in range(turns + 1):
        for who, seconds in took.items():
            before = gpu_mib(lab) if turn == 0 else None
            last[who] = lab.side(who, dtype).ask(**request)
            if turn > 0:
                seconds.extend(cost(last[who]))
            elif before is not None:
                lab.gpu_mib[who] = lab.gpu_mib.get(who, 0) + (gpu_mib(lab) or before) - before
                told.tell(**{f"{name}_{who}_gpu_mib": lab.gpu_mib[who]})
    if request["do"] == "train":  # a step that computes something else is not faster
        losses = {who: answer["losses"][0] for who, answer in last.items()}
        told.expect(f"{name}: our gradient is not zero", min(last["ours"]["grad_norms"]) > 0, f"norms {last['ours']['grad_norms']}")
        if lab.has_peer:
            told.at_most(f"{name}: first loss, to the peer", apart(losses["ours"], losses["peer"]), 1e-3 if dtype == "f32" else 3e-2)
    else:
        wanted = request["prompts"]["counted"]["n"] * request["max_new_tokens"]
        told.expect(f"{name}: all tokens are there", all(answer["n_tokens"] == wanted for answer in last.values()), f"expected {wanted}")
    for who, seconds in took.items():
        median = statistics.median(seconds)
        spread = [round(1e3 * x, 3) for x in (min(seconds), median, max(seconds))]
        told.tell(**{f"{name}_{who}_ms": spread, f"{name}_{who}_tokens_per_s": round(tokens(last[who]) / median)})
        told.tell(**{f"{name}_{who}_peak_mib": round(last[who]["peak_mib"])})
    if lab.has_peer:
        told.tell(**{f"{name}_times_as_fast": round(statistics.median(took["peer"]) / statistics.median(took["ours"]), 2)})


def cudnn(lab, told):
    """Three steps of rows of other shapes each, with cuDNN's attention last and first: is its planning what it costs?"""
    for value, called in [("1", "last"), ("0", "first")]:
        side = lab.start("ours", **{DEPRIORITIZED: value})
        side.ask("open", folder=str(lab.work / "model"), device=lab.device, dtype="bf16", threads=lab.threads)
        side.ask("train", rows=lab.rows(8, 0), rank=8, steps=1)
        steps = [side.ask("train", rows=lab.rows(8, turn), rank=8, steps=1) for turn in (1, 2, 3)]
        told.tell(**{f"cudnn_{called}_ms": [round(1e3 * step["seconds"][0], 1) for step in steps]})
        told.tell(**{f"cudnn_{called}_grad_norms": [step["grad_norms"][0] for step in steps]})
        side.process.kill()


BUDGET = 540  # seconds

# Each check with its limit in seconds. The budget may end it earlier; a larger budget makes the limits larger.
CHECKS = {
    "environment": (environment, 60),
    "models": (models, 90),
    "forward": (forward, 150),
    "training": (training, 150),
    "generation": (generation, 90),
    "determinism": (determinism, 90),
    "program": (program, 90),
    "speed": (speed, 240),
    "variants": (variants, 120),
}
NEED_PEER, NEED_MODEL = {"forward", "training", "generation", "speed"}, {"forward", "training", "generation", "determinism", "speed"}


# The driver.


def child(settings, name):
    lab, told = Lab(settings), Told()
    if name in NEED_PEER and not lab.has_peer:
        told.skipped = "no peer"
    CHECKS[name][0](lab, told)
    told.print()
    for side in lab.sides.values():
        side.process.kill()


def last_line(text):
    """The last whole line of a check; one that was ended while it printed left half of one."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            return json.loads(line)
    return {"passed": True}  # nothing is wrong so far


def watched(settings, name, left, patience):
    """A check in a process group of its own, which ends as a whole: the sides that it started too."""
    log = Path(settings["work"]) / f"{name}.log"
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(settings), "--only", name]
    own = CHECKS[name][1] * patience
    limit = min(own, left)
    begun, late = time.perf_counter(), False
    with log.open("w") as words:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True, start_new_session=True)
        try:
            text = process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        text = process.communicate()[0] if late else text
    found = last_line(text)
    if late and limit < own:
        found |= {"passed": found["passed"] and None, "skipped": "the budget ended it; what it had found is here"}
    elif late or process.returncode:
        why = f"ended after its limit of {limit:.0f} s" if late else f"its process ended with code {process.returncode}"
        found |= {"passed": False, "failed": [*found.get("failed", []), why]}
    if found.get("failed"):
        found["last_words"] = [line[-300:] for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
    return {"check": name, "passed": found.pop("passed"), "seconds": round(time.perf_counter() - begun, 1), **found}


def probe(python):
    """What a Python has, and the sentence that says what is missing."""
    try:
        command = [python, "-c", PROBE]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=120, env=variables())
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as problem:
        return {"missing": f"{python}: {problem}"}


def first_that_is(*paths):
    return next((str(path) for path in paths if path.exists()), None)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N (cuda)")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all checks; what does not fit is skipped ({BUDGET})")
    parser.add_argument("--binaries", type=Path, default=ROOT / "target" / "release", help="the folder of both binaries (target/release)")
    parser.add_argument("--model", help="pocket, random-0.5b, or a model's name (pocket on the CPU, random-0.5b on a GPU)")
    parser.add_argument("--python", default=sys.executable, help="a Python with torch, transformers and peft (this one)")
    parser.add_argument("--only", action="append", choices=CHECKS, help="one check; may be given again")
    parser.add_argument("--out", type=Path, help="a file for the lines, which are printed too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device {args.device}: expected cpu, cuda or cuda:N")
    return args


def settings_of(args, work):
    for name in ["undertone", "undertone-benchmarks"]:
        if not (args.binaries / name).is_file():
            raise SystemExit(
                f"error: {args.binaries}: expected the binary {name}, found none; hint: give their folder by --binaries, or build them by "
                "`cargo build --release --workspace`"
            )
    found = probe(args.python)
    peer_script = first_that_is(ROOT / "benchmarks" / "peer.py", HERE / "peer.py", args.binaries / "peer.py")
    if peer_script is None:
        found.setdefault("missing", "peer.py is neither in benchmarks/ nor beside this script")
    if args.device != "cpu" and "gpu" not in found:
        found.setdefault("missing", "torch finds no GPU")
    folders = map(Path, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    given = os.environ.get("LIBTORCH") or first_that_is(*(folder.parent for folder in folders if (folder / "libtorch_cpu.so").exists()))
    libtorch = given or found.get("torch_folder") or first_that_is(ROOT / ".libtorch")
    if not libtorch:
        raise SystemExit(f"error: LIBTORCH is not set, and {args.python} has no torch; hint: give a Python that has it by --python")
    model = args.model or ("pocket" if args.device == "cpu" else "random-0.5b")
    settings = {"device": args.device, "binaries": str(args.binaries.resolve()), "python": args.python, "work": work, "model": model}
    return settings | {"libtorch": libtorch, "peer_script": peer_script, "has_peer": "missing" not in found}, found


def checks(args, settings, found, say):
    chosen = [name for name in CHECKS if name in (args.only or CHECKS)]
    if NEED_MODEL & set(chosen) and "models" not in chosen:
        chosen.insert(sum(name == "environment" for name in chosen), "models")
    lines, ends = [], time.perf_counter() + args.budget
    for name in chosen:
        left = ends - time.perf_counter()
        made = (Path(settings["work"]) / "model" / "bench.json").exists()
        if left < 5:
            line = {"check": name, "passed": None, "seconds": 0, "skipped": "the budget is used up"}
        elif name in NEED_MODEL and not made:
            line = {"check": name, "passed": None, "seconds": 0, "skipped": "no model"}
        else:
            line = watched(settings, name, left, max(1.0, args.budget / BUDGET))
            if name == "environment":
                line["figures"] = {**line.get("figures", {}), "peer": found}
        lines.append(line)
        say(line)
    return lines


SHOWN = ("_times_as_fast", "_tokens_per_s", "_repeats", "cudnn_first_ms", "cudnn_last_ms", "ask_seconds", "seconds_of_run")


def table(lines):
    """For a reader: a line for each check, and below it what was bounded, told or wrong."""
    for line in lines:
        state = {True: "passed", False: "FAILED", None: "-"}[line["passed"]]
        note = f"  skipped: {line['skipped']}" if "skipped" in line else ""
        print(f"{line['check']:<14}{state:<8}{line['seconds']:>7.1f} s{note}", file=sys.stderr)
        for what, (value, bound) in line.get("bounds", {}).items():
            if not isinstance(value, bool):
                value = float(value)
                print(f"    {what:<66}{value:>10.2g}  at most {bound:g}{'' if value <= bound else '  FAILED'}", file=sys.stderr)
        for name, value in line.get("figures", {}).items():
            if name.endswith(SHOWN):
                print(f"    {name:<66}{value!s:>10}", file=sys.stderr)
        for failure in line.get("failed", []):
            print(f"    failed: {failure}", file=sys.stderr)


def main():
    args = arguments()
    if args.child:
        return child(json.loads(args.child), args.only[0])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the checks' processes are ended too
    work = tempfile.mkdtemp(prefix="check-cuda-")
    try:
        settings, found = settings_of(args, work)
        with args.out.open("w") if args.out else contextlib.nullcontext() as out:

            def say(line):
                for file in filter(None, [sys.stdout, out]):
                    print(json.dumps(line), file=file, flush=True)

            lines = checks(args, settings, found, say)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    table(lines)
    sys.exit(any(line["passed"] is False for line in lines))


if __name__ == "__main__":
    main()
