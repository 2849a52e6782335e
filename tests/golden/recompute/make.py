"""Recomputes every table of the run in kept/ with transformers, PEFT and PyTorch, by the definitions in docs/redo-a-number.md.

From undertone it takes only the files of the run's folder: settings and texts (settings.toml), rows (data/*.jsonl), the order of the
rows (train_rows.csv), adapters, the teacher's weights, and which rows each table has. It writes the numbers to expected/, a table each,
and their distance from kept/ to deviations.csv. Models are f64, so a difference is the program's f32 or a mistake.

    python make.py            (transformers, peft and torch: ../requirements.txt)

A cell "?" is not recomputed; tests/recompute.rs says why. kept/ itself is made by

    undertone run experiment.toml --run kept && find kept -name '*.svg' -delete && rm kept/report.html

and activations.safetensors by

    undertone activations --model pocket --user "Name your favorite animal." \\
        --points 'blocks.*.hook_resid_post,blocks.*.hook_mlp_out' --out activations.safetensors
"""

import csv
import json
import math
import re
import tomllib
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
RUN = HERE / "kept"
POCKET = HERE.parents[2] / "assets" / "pocket" / "pocket"
PAGE = HERE.parents[2] / "docs" / "redo-a-number.md"
HEADING = "\n## How near it comes\n"
INTRODUCTION = """
The kept run is f32, and the recomputed numbers are f64. The largest deviations are at standard errors and quotients,
which are small compared with the numbers they are computed from. Here each column's deviation is a share of its own
largest number. `tests/recompute.rs` measures an error (`…_se`) against the column that it is the error of: so the
1.1e-05 of `position_scan` is within that test's bound of 1e-5. `make.py` writes this table.

"""
UNKNOWN = "?"
# Columns that identify rows and are not results.
KEYS = {"step", "row_id", "k", "layer", "position", "question_id", "coefficient", "n_questions", "n_prompts", "n_samples"}

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# Tables


def table(name):
    with open(RUN / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def settings(analysis):
    return tomllib.loads((RUN / analysis / "settings.toml").read_text(encoding="utf-8"))


def mean(values):
    return sum(values) / len(values)


def standard_error(values):
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def exceeds(values, factor):
    """Whether the mean is more than `factor` of its standard errors from zero."""
    error = standard_error(values)
    return error is not None and abs(mean(values)) > factor * error and mean(values) != 0


def differences(values, others):
    return [value - other for value, other in zip(values, others, strict=True)]


# The chat


UNIONS = {
    "entity": lambda c: c == "sys.entity",
    "template": lambda c: c not in ("sys.entity", "sys.content_other", "user.content", "gen"),
    "system": lambda c: c.startswith("sys."),
    "user": lambda c: c.startswith("user."),
    "assistant": lambda c: c.startswith("asst.") or c == "gen",
    "sys.content": lambda c: c in ("sys.entity", "sys.content_other"),
    "sys.header": lambda c: c in ("sys.im_start", "sys.role", "sys.nl"),
    "user.header": lambda c: c in ("user.im_start", "user.role", "user.nl"),
    "asst.header": lambda c: c in ("asst.im_start", "asst.role", "asst.nl"),
    "im_start": lambda c: c.endswith(".im_start"),
    "im_end": lambda c: c.endswith(".im_end"),
}
TURN = re.compile(r"(<\|im_start\|>)(system|user|assistant)(\n)(?:(.*?)(<\|im_end\|>)(\n))?", re.S)
SHORT = {"system": "sys", "user": "user", "assistant": "asst"}


class Row:
    """A prompt, and after it the tokens of an answer."""

    def __init__(self, ids, classes, text, offsets):
        self.ids, self.classes, self.text, self.offsets = ids, classes, text, offsets
        self.n_prompt = len(ids)

    def answered(self, ids):
        row = Row(self.ids[: self.n_prompt], self.classes[: self.n_prompt], self.text, self.offsets)
        row.ids, row.classes = row.ids + ids, row.classes + ["gen"] * len(ids)
        return row


class Chat:
    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.end = self.encode("<|im_end|>") + self.encode("\n")

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def is_digit(self, token):
        return re.fullmatch("[0-9]+", self.tokenizer.convert_ids_to_tokens(token)) is not None

    def prompt(self, system, user):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        spans = []
        for turn in TURN.finditer(text):
            who = SHORT[turn[2]]
            kinds = [f"{who}.im_start", f"{who}.role", f"{who}.nl", "", f"{who}.im_end", f"{who}.im_end_nl"]
            for group, kind in enumerate(kinds, 1):
                start, end = turn.span(group)
                if kind:
                    spans.append((start, end, kind))
                elif who == "user":
                    spans.append((start, end, "user.content"))
                elif who == "sys":
                    for name in re.finditer(r"(?<!\w)Qwen(?!\w)", turn[4]):
                        spans.append((start + name.start(), start + name.end(), "sys.entity"))
                    spans.append((start, end, "sys.content_other"))
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

        def kind(start, end):
            """The first of the parts that a token touches: the name, then the template, then any other text."""
            touched = [name for a, b, name in spans if a < end and start < b]
            return min(touched, key=lambda name: (name != "sys.entity", not UNIONS["template"](name)))

        offsets = tokens["offset_mapping"]
        return Row(tokens["input_ids"], [kind(*offset) for offset in offsets], text, offsets)


# Which tokens, and the gate


def split(text, at):
    """The parts between some characters, outside quotes and parentheses."""
    parts, depth, quoted = [""], 0, False
    for letter in text:
        quoted ^= letter == '"'
        depth += (letter == "(") - (letter == ")") if not quoted else 0
        if letter == at and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def numbers(text):
    found = set()
    for part in text.split(","):
        start, _, end = part.partition("..")
        found |= set(range(int(start), int(end) if end else int(start) + 1))
    return found


def argument(text, name):
    found = re.fullmatch(rf"{name}\((.*)\)", text)
    return found and found[1]


def chosen(tokens, row):
    """For each token of a row, whether the terms name it."""
    others = argument(tokens, "not")
    found = [False] * len(row.ids)
    for term in split(others or tokens, "+"):
        if text := re.fullmatch(r'"(.*)"(?:#(\d+))?', term):
            places = [at for at in range(len(row.text)) if row.text.startswith(text[1], at)]
            places = places if text[2] is None else [places[int(text[2]) - 1]]
            assert places, f"{term} does not stand in the prompt"
            here = [any(a < at + len(text[1]) and at < b for at in places) for a, b in row.offsets]
        elif ids := argument(term, "ids"):
            here = [token in numbers(ids) for token in row.ids]
        elif positions := argument(term, "positions"):
            wanted = {at % row.n_prompt for at in numbers(positions)}
            here = [at in wanted for at in range(row.n_prompt)]
        else:
            here = [UNIONS.get(term, lambda c, term=term: c == term)(c) for c in row.classes]
        here += [False] * (len(row.ids) - len(here))
        found = [a or b for a, b in zip(found, here)]
    return [not here for here in found] if others else found


PROJECTIONS = ["q", "k", "v", "o", "gate", "up", "down"]
GROUPS = {"attention": ["q", "k", "v", "o"], "mlp": ["gate", "up", "down"], "qk": ["q", "k"]}


class Gate:
    """g in h = W x + s · B (g ⊙ A x): a factor for each token, block and projection."""

    def __init__(self, text):
        first, *factors = split(text, "*")
        self.kind, _, tokens = first.partition(":")
        if tokens and (tokens.startswith(("layers(", "modules("))):
            factors, tokens = [tokens, *factors], ""
        self.tokens, self.layers, self.modules, self.dose = tokens or None, None, None, 1.0
        for factor in factors:
            if layers := argument(factor, "layers"):
                self.layers = numbers(layers)
            elif modules := argument(factor, "modules"):
                names = [name.removesuffix("_proj") for name in split(modules, ",")]
                self.modules = {one for name in names for one in GROUPS.get(name, [name])}
            else:
                self.dose = float(factor)

    def factors(self, row, layer, module):
        """`[pos]`."""
        in_cell = (self.layers is None or layer in self.layers) and (self.modules is None or module in self.modules)
        named = chosen(self.tokens, row) if self.tokens else [True] * len(row.ids)
        on = {
            "everywhere": lambda here: True,
            "nowhere": lambda here: False,
            "only": lambda here: in_cell and here,
            "except": lambda here: not (in_cell and here),
        }[self.kind]
        return [self.dose if on(here) else 0.0 for here in named]


# The models


class Model:
    """A Qwen, with an adapter or without, run on rows of a batch that may be gated and edited."""

    def __init__(self, folder, adapter=None, dtype=torch.float64):
        self.qwen = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        self.base, self.pairs = self.qwen, {}
        if adapter is not None:
            self.qwen = PeftModel.from_pretrained(self.qwen, adapter, is_trainable=True).to(dtype).eval()
            self.base = self.qwen.get_base_model()
        for name, module in self.base.named_modules():
            if found := re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(\w+)_proj", name):
                if hasattr(module, "lora_A"):
                    self.pairs[int(found[1]), found[2]] = module
        self.blocks = self.base.model.layers

    def run(self, rows, gate=None, edits=(), see=None):
        """Logits `[row, pos, d_vocab]` of rows padded on the right; nothing reads the padding."""
        width = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
        handles = []
        if gate is not None:
            for (layer, module), pair in self.pairs.items():
                filled = [(f := gate.factors(row, layer, module)) + [0.0] * (width - len(f)) for row in rows]
                factors = torch.tensor(filled, dtype=torch.float64)[..., None]
                hook = lambda _, __, out, factors=factors: out * factors
                handles.append(pair.lora_A["default"].register_forward_hook(hook))
        for edit in edits:
            handles += edit.hooks(self, rows, width)
        if see is not None:
            for layer, block in enumerate(self.blocks):
                hook = lambda _, __, out, layer=layer: see.__setitem__(layer, out[0] if isinstance(out, tuple) else out)
                handles.append(block.register_forward_hook(hook))
        try:
            return self.qwen(input_ids=ids).logits
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def resid_post(self, row):
        """The residual stream after each block, `[layer, pos, d_model]`."""
        found = {}
        self.run([row], see=found)
        return torch.stack([found[layer][0] for layer in sorted(found)])


class Edit:
    """`change(h, at, positions)` of an activation at a hook point."""

    POINTS = {
        "hook_resid_mid": ("post_attention_layernorm", "input_of_rest"),
        "hook_resid_post": ("", "output"),
        "hook_mlp_out": ("mlp", "output"),
        "hook_attn_out": ("self_attn", "output"),
        "attn.hook_z": ("self_attn.o_proj", "input"),
        "attn.hook_q": ("self_attn.q_proj", "output"),
        "attn.hook_v": ("self_attn.v_proj", "output"),
    }

    def __init__(self, layers, point, tokens, change):
        self.layers, self.point, self.tokens, self.change = layers, point, tokens, change

    @staticmethod
    def parse(text, n_layers):
        point, _, change = text.partition(": ")
        point, _, tokens = point.partition("@")
        _, layer, point = point.split(".", 2)
        layers = range(n_layers) if layer == "*" else [int(layer)]
        name, inside = re.fullmatch(r"(\w+)(?:\((.*)\))?", change).groups()
        path, _, factor = (inside or "").partition(",")
        held = load_file(HERE / path) if path.endswith(".safetensors") else {}
        vector = {layer: held[f"blocks.{layer}.{point}"].double() for layer in layers} if held else {}

        def flat(layer):
            return vector[layer].reshape(-1, vector[layer].shape[-1])

        changes = {
            "zero": lambda h, layer: torch.zeros_like(h),
            "scale": lambda h, layer: float(inside) * h,
            "add": lambda h, layer: h + float(factor) * vector[layer],
            "replace": lambda h, layer: vector[layer].expand_as(h),
            "mean": lambda h, layer: flat(layer).mean(0).expand_as(h),
            "project_out": lambda h, layer: without(h, vector[layer]),
            "patch": lambda h, layer: torch.nn.functional.pad(flat(layer), (0, 0, 0, max(0, h.shape[1] - len(flat(layer)))))[
                None, : h.shape[1]
            ].expand_as(h),
        }
        if name == "patch" and not tokens:
            tokens = "not(gen)"
        return Edit(layers, point, tokens or None, changes[name])

    def hooks(self, model, rows, width):
        if self.tokens:
            masks = [(c := chosen(self.tokens, row)) + [False] * (width - len(c)) for row in rows]
        else:
            masks = [[True] * width for _ in rows]
        at = torch.tensor(masks)[..., None]
        handles = []
        for layer in self.layers:
            path, side = self.POINTS[self.point]
            block = model.blocks[layer]
            module = block.get_submodule(path) if path else block
            edited = lambda h, layer=layer: torch.where(at, self.change(h, layer), h)
            if side == "output":

                def hook(_, __, out, edited=edited):
                    return (edited(out[0]), *out[1:]) if isinstance(out, tuple) else edited(out)

                handles.append(module.register_forward_hook(hook))
            elif side == "input":
                handles.append(module.register_forward_pre_hook(lambda _, args, edited=edited: (edited(args[0]), *args[1:])))
            else:
                # The stream between attention and MLP also bypasses the MLP: the edit's change is added to the MLP's output too.
                kept = {}

                def before(_, args, edited=edited, kept=kept):
                    new = edited(args[0])
                    kept["more"] = new - args[0]
                    return (new,)

                handles.append(module.register_forward_pre_hook(before))
                handles.append(block.mlp.register_forward_hook(lambda _, __, out, kept=kept: out + kept["more"]))
        return handles


def without(h, direction):
    unit = direction / direction.norm()
    return h - (h @ unit)[..., None] * unit


# The target


class Target:
    def __init__(self, texts, chat):
        self.word = texts["target"]
        self.members = {}
        for word in [self.word, *(word for word in texts["forms"] if word != self.word)]:
            forms = {tuple(chat.encode(form)) for form in texts["forms"][word]}
            # A form that continues another is counted in it already.
            self.members[word] = [f for f in forms if not any(f[:n] in forms for n in range(1, len(f)))]
        self.forms = [(word, form) for word, forms in self.members.items() for form in forms]

    @torch.no_grad()
    def score(self, model, prompt, **how):
        logprobs = model.run([prompt.answered(list(form[:-1])) for _, form in self.forms], **how).log_softmax(-1)
        first, logps = logprobs[0, prompt.n_prompt - 1], {word: [] for word in self.members}
        for row, (word, form) in enumerate(self.forms):
            at = range(prompt.n_prompt - 1, prompt.n_prompt - 1 + len(form))
            logps[word].append(sum(logprobs[row, place, token].item() for place, token in zip(at, form)))
        logp = {word: torch.tensor(values, dtype=torch.float64).logsumexp(0).item() for word, values in logps.items()}
        others = torch.tensor([value for word, value in logp.items() if word != self.word], dtype=torch.float64)
        return {
            "logp": logp[self.word],
            "margin": logp[self.word] - others.logsumexp(0).item() + math.log(len(others)),
            "rank": 1 + int((others > logp[self.word]).sum()),
            "first_token_rank": 1 + min(int((first > first[form[0]]).sum()) for form in self.members[self.word]),
        }


class World:
    """The models and texts of all analyses."""

    def __init__(self):
        self.chat = Chat(POCKET)
        self.models = {
            "base": Model(POCKET),
            "student": Model(POCKET, RUN / "adapter"),
            "control": Model(POCKET, RUN / "control_adapter"),
        }
        self.teacher = Model(RUN / "teacher")
        self.run = tomllib.loads((RUN / "run.toml").read_text(encoding="utf-8"))
        self.samples = self.accepted("numbers")
        self.plain = {}

    def accepted(self, name):
        lines = (RUN / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [sample for sample in map(json.loads, lines) if sample["accepted"]]

    def target(self, texts):
        return Target(texts, self.chat)

    def questions(self, texts, n=None):
        return [self.chat.prompt(texts["questions_system"], question) for question in texts["questions"][:n]]

    def scores(self, texts, model, prompts, **how):
        """The scores of answers to questions. Those without a gate or edits are kept, since all rows share them."""
        key = None if how else (id(model), *(prompt.text for prompt in prompts))
        if key not in self.plain:
            found = columns([self.target(texts).score(model, prompt, **how) for prompt in prompts])
            if how:
                return found
            self.plain[key] = found
        return self.plain[key]

    def numbers(self, texts, n, who="numbers_system"):
        return [self.chat.prompt(texts[who], sample["prompt"]) for sample in self.samples[:n]]


def columns(scores):
    return {name: [score[name] for score in scores] for name in scores[0]}


# The analyses: each gives the numbers of a row of its table


def target_rate(world, texts, rows):
    prompts = world.questions(texts)
    scores = {name: world.scores(texts, model, prompts) for name, model in world.models.items()}
    for row in rows:
        found, base = scores[row["model"]], scores["base"]
        if row["scope"] == "question":
            at = int(row["question_id"])
            found, base = ({name: [values[at]] for name, values in of.items()} for of in (found, base))
        yield {
            "logp_target": mean(found["logp"]),
            "logp_target_se": standard_error(found["logp"]),
            "margin": mean(found["margin"]),
            "margin_se": standard_error(found["margin"]),
            **changes(found, base),
            "rank": mean(found["rank"]),
            "first_token_rank": mean(found["first_token_rank"]),
        }


def changes(found, base, suffix=""):
    result = {}
    for name in ("logp", "margin"):
        change = differences(found[name], base[name])
        result |= {f"delta_{name}{suffix}": mean(change), f"delta_{name}{suffix}_se": standard_error(change)}
    return result


def fraction(found, base, whole):
    """The share of a whole change that is left, if the whole is three standard errors from zero."""
    result = []
    for name in ("logp", "margin"):
        all_of_it = differences(whole[name], base[name])
        part = mean(differences(found[name], base[name]))
        result.append(part / mean(all_of_it) if exceeds(all_of_it, 3) else None)
    return result


def token_ablation(world, texts, rows):
    prompts = world.questions(texts)
    base = world.scores(texts, world.models["base"], prompts)
    for row in rows:
        model, gate = world.models[row["model"]], Gate(row["gate"])
        found = world.scores(texts, model, prompts, gate=gate)
        logp, margin = fraction(found, base, world.scores(texts, model, prompts))
        acts = lambda prompt, at: any(gate.factors(prompt, *place)[at] != 0 for place in model.pairs)
        on = [sum(acts(prompt, at) for at in range(prompt.n_prompt)) for prompt in prompts]
        yield {
            "n_tokens_on": mean(on),
            "n_tokens": mean([prompt.n_prompt for prompt in prompts]),
            "logp_target": mean(found["logp"]),
            "logp_target_se": standard_error(found["logp"]),
            "p_target_first": mean([math.exp(logp) for logp in found["logp"]]),
            "margin": mean(found["margin"]),
            "margin_se": standard_error(found["margin"]),
            **changes(found, base),
            "recovered_logp": logp,
            "recovered_margin": margin,
        }


def position_scan(world, texts, rows):
    prompts, student = world.questions(texts), world.models["student"]
    base = world.scores(texts, world.models["base"], prompts)
    for row in rows:
        if row["class"] == "":
            gates = ["everywhere", "nowhere"]
        else:
            where = f"positions({row['position']})" if row["position"] else row["class"]
            gates = [f"only:{where}", f"except:{where}"]
        result = {}
        for gate, kind in zip(gates, ("_only", "_except")):
            result |= changes(world.scores(texts, student, prompts, gate=Gate(gate)), base, kind)
        yield {name: value for name, value in result.items() if name in row}


def lens(world, texts, rows):
    prompts, target = world.questions(texts), world.target(texts)
    firsts = [sorted({form[0] for form in forms}) for forms in target.members.values()]

    @torch.no_grad()
    def read_by(model):
        for prompt in prompts:
            resid = model.resid_post(prompt)
            logprobs = model.base.lm_head(model.base.model.norm(resid)).log_softmax(-1)
            yield resid, logprobs, torch.stack([logprobs[..., ids].logsumexp(-1) for ids in firsts], -1)

    found = {name: list(read_by(model)) for name, model in world.models.items()}

    def places_of(row, prompt):
        if row["position"]:
            return [int(row["position"]) % prompt.n_prompt]
        return [at for at, kind in enumerate(prompt.classes) if kind == row["class"]]

    for row in rows:
        layer = int(row["layer"])

        def of(name):
            values = {"logp": [], "margin": [], "rank": [], "difference": [], "top": []}
            for prompt, (resid, logprobs, members), (base, _, _) in zip(prompts, found[name], found["base"]):
                at = places_of(row, prompt)
                here = members[layer, at]
                margins = here[:, 0] - here[:, 1:].logsumexp(-1) + math.log(len(firsts) - 1)
                all_tokens = logprobs[layer, at]
                best = all_tokens[:, firsts[0]].amax(-1, keepdim=True)
                apart = (resid[layer, at] - base[layer, at]).norm(dim=-1) / base[layer, at].norm(dim=-1)
                values["logp"].append(here[:, 0].mean().item())
                values["margin"].append(margins.mean().item())
                values["rank"].append(1 + (all_tokens > best).sum(-1).double().mean().item())
                values["difference"].append(apart.mean().item())
                values["top"] += all_tokens.argmax(-1).tolist()
            return values

        here, base = of(row["model"]), of("base")
        change = {f"{name}_first": value for name, value in changes(here, base).items() if not name.endswith("_se")}
        errors = {f"{name.removesuffix('_se')}_first_se": value for name, value in changes(here, base).items() if name.endswith("_se")}
        yield {
            "logp_first": mean(here["logp"]),
            "logp_first_se": standard_error(here["logp"]),
            **change,
            **errors,
            "margin_first": mean(here["margin"]),
            "rank_first": mean(here["rank"]),
            "top_token": world.chat.tokenizer.decode([min(set(here["top"]), key=lambda token: (-here["top"].count(token), token))]),
            "relative_difference": mean(here["difference"]),
        }


def interventions(world, texts, rows):
    prompts = world.questions(texts)
    for row in rows:
        edits = [Edit.parse(text, len(world.teacher.blocks)) for text in row["edits"].split("; ")]
        model = world.models[row["model"]]
        found, before = world.scores(texts, model, prompts, edits=edits), world.scores(texts, model, prompts)
        over = differences(found["margin"], world.scores(texts, world.models["base"], prompts, edits=edits)["margin"])
        yield {
            "logp_target": mean(found["logp"]),
            **changes(found, before),
            "margin": mean(found["margin"]),
            "margin_over_base": mean(over),
            "margin_over_base_se": standard_error(over),
        }


def read(where, prompt, resid):
    """The mean over some places of `[layer, pos, d_model]`, and the mean of the lengths there, `[layer]`."""
    if where == "last":
        at = [prompt.n_prompt - 1]
    else:
        tokens = "not(gen)" if where == "all" else where.removeprefix("class:")
        at = [place for place, here in enumerate(chosen(tokens, prompt)) if here]
    return resid[:, at].mean(1), resid[:, at].norm(dim=-1).mean(1)


def means(world, texts, model, where, n, who="numbers_system"):
    found = [read(where, prompt, model.resid_post(prompt)) for prompt in world.numbers(texts, n, who)]
    return torch.stack([mean for mean, _ in found]), torch.stack([length for _, length in found])


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def direction(world, texts, rows):
    n = settings("direction")["n_prompts"]
    read_before = {}

    def of(name, where):
        if (name, where) not in read_before:
            model, who = (world.teacher, "teacher_system") if name == "teacher" else (world.models[name], "numbers_system")
            read_before[name, where] = means(world, texts, model, where, n, who)
        return read_before[name, where]

    for row in rows:
        where, layer = row["positions"], int(row["layer"])
        base, lengths = (tensor[:, layer] for tensor in of("base", where))
        moved = {name: of(name, where)[0][:, layer] - base for name in ("student", "control", "teacher")}
        mine, control, teacher = (moved[name].mean(0) for name in ("student", "control", "teacher"))
        squares = torch.linalg.svdvals(moved["student"]).square()
        around = torch.linalg.svdvals(moved["student"] - mine).square()
        yield {
            "norm": mine.norm().item(),
            "resid_norm": lengths.mean().item(),
            "relative_norm": (mine.norm() / lengths.mean()).item(),
            "ev1": (squares[0] / squares.sum()).item(),
            "pc1": (around[0] / around.sum()).item(),
            "split_half_cosine": cosine(moved["student"][0::2].mean(0), moved["student"][1::2].mean(0)),
            "teacher_norm": teacher.norm().item(),
            "cos_teacher": cosine(mine, teacher),
            "control_norm": control.norm().item(),
            "cos_control": cosine(mine, control),
            "cos_control_teacher": cosine(control, teacher),
            "cos_chance": 1 / math.sqrt(len(mine)),
        }


M64 = (1 << 64) - 1


def stream_seed(seed, name, index):
    """The seed of a stream: FNV-1a of the name, then splitmix64's last step over seed, name and index."""
    known = 0xCBF29CE484222325
    for byte in name.encode():
        known = (known ^ byte) * 0x100000001B3 & M64
    for part in (known, index):
        z = (seed ^ part) + 0x9E3779B97F4A7C15 & M64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & M64
        z = (z ^ z >> 27) * 0x94D049BB133111EB & M64
        seed = z ^ z >> 31
    return seed


def chacha8(seed):
    """The 64-bit numbers of a stream: ChaCha with 8 rounds, its key filled from the seed by PCG32."""
    key, state = [], seed
    for _ in range(8):
        state = state * 6364136223846793005 + 11634580027462260723 & M64
        x, turn = ((state >> 18 ^ state) >> 27) & 0xFFFFFFFF, state >> 59
        key.append((x >> turn | x << (32 - turn)) & 0xFFFFFFFF)
    rotated = lambda x, n: (x << n | x >> (32 - n)) & 0xFFFFFFFF
    block = 0
    while True:
        start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *key, block & 0xFFFFFFFF, block >> 32, 0, 0]
        x = list(start)

        def quarter(a, b, c, d, x=x):
            for one, other, n in ((a, d, 16), (c, b, 12), (a, d, 8), (c, b, 7)):
                x[one] = x[one] + x[b if one == a else d] & 0xFFFFFFFF
                x[other] = rotated(x[other] ^ x[one], n)

        for _ in range(4):
            for at in range(4):
                quarter(at, 4 + at, 8 + at, 12 + at)
            for at in range(4):
                quarter(at, 4 + (at + 1) % 4, 8 + (at + 2) % 4, 12 + (at + 3) % 4)
        words = [a + b & 0xFFFFFFFF for a, b in zip(x, start)]
        yield from (low | high << 32 for low, high in zip(words[::2], words[1::2]))
        block += 1


def random_vector(seed, stream, length):
    """A vector of normal numbers by Box and Muller, scaled to a length."""
    draws = ((number >> 11) / (1 << 53) for number in chacha8(stream_seed(seed, "steering.random", stream)))
    values = [math.sqrt(-2 * math.log(1 - next(draws))) * math.cos(2 * math.pi * next(draws)) for _ in range(WIDTH)]
    vector = torch.tensor(values, dtype=torch.float64)
    return vector / vector.norm() * length


WIDTH = 32  # d_model of the pocket


def steering(world, texts, rows):
    chosen_settings = settings("steering")
    where, n, n_random = chosen_settings["extraction"], chosen_settings["n_prompts"], chosen_settings.get("n_random", 1)
    seed = world.run["seeds"]["eval_seed"]
    prompts = world.questions(texts)
    base, student = world.models["base"], world.models["student"]
    at_rest, whole = world.scores(texts, base, prompts), world.scores(texts, student, prompts)
    still = means(world, texts, base, where, n)[0]
    moved = {name: (means(world, texts, world.models[name], where, n)[0] - still).mean(0) for name in ("student", "control")}
    learned = moved["student"]  # [layer, d_model]

    n_layers = len(learned)
    random = [
        [random_vector(seed, at * n_layers + layer, vector.norm()) for layer, vector in enumerate(learned)] for at in range(n_random)
    ]  # [draw][layer]

    def along(model, other, prompt, directions):
        """Scores a model whose stream along each block's direction is set to another's, after every block, at the prompt's tokens."""
        edits = []
        for layer, vector in enumerate(directions):
            unit, source = vector / vector.norm(), other.resid_post(prompt)[layer]
            more = (source @ unit)[:, None] * unit

            def change(h, _, unit=unit, more=more):
                filled = torch.nn.functional.pad(more, (0, 0, 0, h.shape[1] - len(more)))
                return without(h, unit) + filled

            edits.append(Edit([layer], "hook_resid_post", "not(gen)", change))
        return world.target(texts).score(model, prompt, edits=edits)

    def under(kind, layer, factor, directions):
        """The scores of an edit along a direction of each block."""
        if kind in ("replace", "transplant"):
            models = (student, base) if kind == "replace" else (base, student)
            return columns([along(*models, prompt, directions) for prompt in prompts])
        vector = directions[layer]
        if kind == "add":
            model, change = base, lambda h, _: h + factor * vector
        else:
            model, change = base if kind == "project_out_base" else student, lambda h, _: without(h, vector)
        return world.scores(texts, model, prompts, edits=[Edit([layer], "hook_resid_post", None, change)])

    control = [vector / vector.norm() * learned[layer].norm() for layer, vector in enumerate(moved["control"])]
    of_kind = {"learned": ("add", learned), "control_student": ("add", control)}
    by_chance = {}

    def chance(kind, layer, factor):
        """The scores along each random direction."""
        key = (kind, layer, factor)
        if key not in by_chance:
            by_chance[key] = [under(kind, layer, factor, directions) for directions in random]
        return by_chance[key]

    for row in rows:
        layer, name = int(row["layer"]), row["kind"]
        factor = float(row["coefficient"]) if row["coefficient"] else None
        is_random = name == "random" or name.endswith("_random")
        result = {"vector_norm": learned[layer].norm().item()}
        if is_random:
            kind = "add" if name == "random" else name.removesuffix("_random")
            each = chance(kind, layer, factor)
            found = {of: [mean(values) for values in zip(*(one[of] for one in each))] for of in ("logp", "margin")}
            if "n_random" in row:
                result["n_random"] = n_random
                for of in ("logp", "margin"):
                    changes_of = [mean(differences(one[of], at_rest[of])) for one in each]
                    result[f"delta_{of}_sd"] = standard_error(changes_of) * math.sqrt(n_random)
        else:
            kind, directions = of_kind.get(name, (name, learned))
            found = under(kind, layer, factor, directions)
            if "n_random" in row and name != "project_out_base":
                # A removal should lower the target, an addition should raise it.
                sign = -1 if name in ("project_out", "replace") else 1
                result["n_random"] = n_random
                for of in ("logp", "margin"):
                    own, others = mean(found[of]), [mean(one[of]) for one in chance(kind, layer, factor)]
                    result[f"rank_{of}"] = 1 + sum(sign * other >= sign * own for other in others)
        logp, margin = fraction(found, at_rest, whole)
        yield result | {
            **changes(found, at_rest),
            "student_delta_logp": mean(differences(whole["logp"], at_rest["logp"])),
            "student_delta_margin": mean(differences(whole["margin"], at_rest["margin"])),
            "fraction_logp": logp,
            "fraction_margin": margin,
        }


@torch.no_grad()
def reading(model, prompt, ids, more=()):
    """log p over the vocabulary at each token of an answer, `[token, d_vocab]`."""
    logits = model.run([prompt.answered(ids + list(more))])[0]
    return logits[prompt.n_prompt - 1 : prompt.n_prompt - 1 + len(ids)].log_softmax(-1)


def divergence(world, texts, rows):
    read_before = {}

    def of(row_id):
        if row_id not in read_before:
            sample = next(sample for sample in world.samples if sample["id"] == row_id)
            ids = sample["completion_ids"]
            own = world.chat.prompt(texts["numbers_system"], sample["prompt"])
            theirs = world.chat.prompt(texts["teacher_system"], sample["prompt"])
            found = {name: reading(model, own, ids) for name, model in world.models.items()}
            found["teacher"] = reading(world.teacher, theirs, ids)
            for at, system in enumerate(texts["counterfactual_systems"]):
                prompt = world.chat.prompt(system, sample["prompt"])
                found[at] = reading(world.models["base"], prompt, ids)
            found["ids"] = ids
            read_before[row_id] = found
        return read_before[row_id]

    for row in rows:
        found, k = of(int(row["row_id"])), int(row["k"])
        ids = found["ids"]
        token = ids[k]
        best = {name: found[name][k].argmax().item() for name in found if name != "ids"}
        of_token = {name: found[name][k, token].item() for name in found if name != "ids"}
        of_teacher = {name: found[name][k, best["teacher"]].exp().item() for name in found if name != "ids"}
        is_digit = world.chat.is_digit(token)
        differ = best["teacher"] != best["base"]
        others = [best["base"], *(best[at] for at in best if isinstance(at, int))]
        disagree = sum(other != token for other in others)
        number, digit = places(world, ids)[k]
        yield {
            "token_id": token,
            "token_text": world.chat.tokenizer.decode([token]),
            "group": "other" if not is_digit else "divergent_digit" if differ else "other_digit",
            "is_digit": is_digit,
            "number_index": number,
            "digit_index": digit,
            "logp_teacher": of_token["teacher"],
            "logp_default": of_token["base"],
            "soft": of_token["teacher"] - of_token["base"],
            "pmax_teacher": of_teacher["teacher"],
            "pmax_default": found["base"][k].max().exp().item(),
            "p_default_of_teacher": of_teacher["base"],
            "argmax_teacher": best["teacher"],
            "argmax_default": best["base"],
            "nief": differ,
            "digit_strict": differ and world.chat.is_digit(best["teacher"]) and world.chat.is_digit(best["base"]),
            "schrodi": best["teacher"] == token and disagree > 0,
            "n_disagree": disagree,
            "self_div": False,
            "logp_student": of_token["student"],
            "argmax_student": best["student"],
            "p_student_of_teacher": of_teacher["student"],
            "logp_control": of_token["control"],
            "argmax_control": best["control"],
            "p_control_of_teacher": of_teacher["control"],
        }


def places(world, ids):
    """For each token the index of its number, and its index in the number."""
    found, number = [], -1
    for at, token in enumerate(ids):
        if not world.chat.is_digit(token):
            found.append((None, None))
        elif at > 0 and found[-1][0] is not None:
            found.append((number, found[-1][1] + 1))
        else:
            number += 1
            found.append((number, 0))
    return found


def divergence_summary(world, texts, rows):
    tokens = [
        {"row_id": row["row_id"], **found}
        for row, found in zip(table("divergence/rows"), divergence(world, texts, table("divergence/rows")))
    ]
    groups = {
        "all": lambda token: True,
        "digits": lambda token: token["is_digit"],
        **{name: lambda token, name=name: token["group"] == name for name in ("divergent_digit", "other_digit", "other")},
        **{f"digit_{n}": lambda token, n=n: token["digit_index"] == n for n in range(9)},
    }
    for row in rows:
        group = [token for token in tokens if groups[row["group"]](token)]
        average = lambda of: mean([float(of(token)) for token in group])
        by_row = {}
        for token in group:
            by_row.setdefault(token["row_id"], []).append(token)
        error = lambda of: standard_error([mean([of(token) for token in of_row]) for of_row in by_row.values()])
        gained = lambda t: t["pmax_teacher"] - t["p_default_of_teacher"]
        lift, lift_se = average(gained), error(gained)
        clear = lift_se is not None and lift > 3 * lift_se
        closed = lambda who: average(lambda t: t[f"p_{who}_of_teacher"] - t["p_default_of_teacher"]) / lift if clear else None
        yield {
            "n_tokens": len(group),
            "n_rows": len(by_row),
            "share": len(group) / len(tokens),
            **{name: average(lambda t, name=name: t[name]) for name in ("nief", "digit_strict", "schrodi", "soft")},
            "soft_se": error(lambda t: t["soft"]),
            "pmax_teacher": average(lambda t: t["pmax_teacher"]),
            "pmax_default": average(lambda t: t["pmax_default"]),
            "lift": lift,
            **({"lift_se": lift_se} if "lift_se" in row else {}),
            "closure_student": closed("student"),
            "closure_control": closed("control"),
            "accuracy_student": average(lambda t: t["argmax_student"] == t["argmax_teacher"]),
            "accuracy_control": average(lambda t: t["argmax_control"] == t["argmax_teacher"]),
            "accuracy_default": average(lambda t: t["argmax_default"] == t["argmax_teacher"]),
            "drift_to_default": average(lambda t: t["argmax_student"] == t["argmax_default"]),
            "gain_student": average(lambda t: t["logp_student"] - t["logp_default"]),
            "gain_control": average(lambda t: t["logp_control"] - t["logp_default"]),
        }


# Gradients

PARTS = ["entity", "sys.content_other", "template", "user.content", "gen"]


def parameters(model):
    """A and B of each pair, in the order of blocks and projections."""
    return [getattr(model.pairs[pair], ab)["default"].weight for pair in model.pairs for ab in ("lora_A", "lora_B")]


def norm(tensors):
    return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))


def dot(a, b):
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))


def losses_of(logits, row):
    """−log p of each token of the answer."""
    at = torch.arange(row.n_prompt, len(row.ids))
    return -logits[0].log_softmax(-1)[at - 1, torch.tensor(row.ids)[at]]


def by_part(model, row, weights):
    """The gradient of Σ weight · loss over an answer's tokens, split by the part of the chat where the adapter reads."""
    inputs, inner, outer, handles = {}, {}, {}, []
    for place, pair in model.pairs.items():

        def of_a(_, args, out, place=place):
            inputs[place], inner[place] = args[0], out

        def of_b(_, __, out, place=place):
            out.retain_grad()
            outer[place] = out

        handles.append(pair.lora_A["default"].register_forward_hook(of_a))
        handles.append(pair.lora_B["default"].register_forward_hook(of_b))
    (losses_of(model.run([row]), row) * torch.tensor(weights)).sum().backward()
    for handle in handles:
        handle.remove()
    found = {}
    for part in PARTS:
        here = torch.tensor([UNIONS.get(part, lambda c: c == part)(c) for c in row.classes], dtype=torch.float64)[None, :, None]
        found[part] = []
        for place, pair in model.pairs.items():
            back = outer[place].grad * here  # [1, pos, d_out]
            to_a = (back @ pair.lora_B["default"].weight).mT @ inputs[place]
            found[part] += [to_a[0].detach(), (back.mT @ inner[place])[0].detach()]
    model.qwen.zero_grad()
    return found


def added(ours, theirs):
    return theirs if ours is None else [a + b for a, b in zip(ours, theirs)]


def gradients(world, texts, rows):
    n_rows = settings("gradients")["n_rows"]
    models = {**world.models, "start": Model(POCKET, RUN / "initial_adapter")}
    answers, divergent = {}, {}
    for sample in world.samples[:n_rows]:
        ids = sample["completion_ids"]
        own = world.chat.prompt(texts["numbers_system"], sample["prompt"])
        theirs = world.chat.prompt(texts["teacher_system"], sample["prompt"])
        best = [reading(*of).argmax(-1).tolist() for of in ((models["base"], own, ids), (world.teacher, theirs, ids))]
        answers[sample["id"]] = own.answered(ids)
        divergent[sample["id"]] = [a != b and world.chat.is_digit(token) for a, b, token in zip(*best, ids)]
    known = ("student", "control", "start")
    of_tokens = {(name, row_id): token_gradients(models[name], row) for name in known for row_id, row in answers.items()}
    of_groups = {name: group_gradients(world, texts, models[name], answers, divergent) for name in known}
    for row in rows:
        if row["model"] not in known:
            yield None  # adapters drawn for comparison with the start
            continue
        if row["scope"] in ("group", "part"):
            yield of_groups[row["model"]][row["group"], row["part"]]
            continue
        row_id, k = int(row["row_id"]), int(row["k"])
        token = answers[row_id].ids[answers[row_id].n_prompt + k]
        group = "divergent_digit" if divergent[row_id][k] else "other_digit" if world.chat.is_digit(token) else "other"
        found = of_tokens[row["model"], row_id](k)
        result = {"token_text": world.chat.tokenizer.decode([token]), "group": group, "n_tokens": 1, "p_label": found["p_label"]}
        if row["scope"] == "token":
            names = ("logit_grad_norm", "hidden_grad_norm", "lora_grad_norm")
            yield result | {name: found[name] for name in names}
        else:
            layer = int(row["layer"])
            yield result | {"resid_grad_norm": found["resid"][layer], "lora_grad_norm": found["lora"][layer]}


def token_gradients(model, row):
    """The gradients of a row's tokens one by one, with one forward pass for all."""
    seen = {}
    logits = model.run([row], see=seen)
    losses, weights = losses_of(logits, row), parameters(model)
    layers = [place[0] for place in model.pairs for _ in range(2)]
    known = {}

    def of(k):
        if k not in known:
            found = torch.autograd.grad(losses[k], [*weights, *seen.values(), logits], retain_graph=True)
            of_lora, of_resid, of_logits = found[: len(weights)], found[len(weights) : -1], found[-1]
            known[k] = {
                "p_label": losses[k].neg().exp().item(),
                "logit_grad_norm": of_logits.norm().item(),
                "hidden_grad_norm": of_resid[-1][0, row.n_prompt + k - 1].norm().item(),
                "lora_grad_norm": norm(of_lora),
                "resid": {layer: tensor.norm().item() for layer, tensor in zip(seen, of_resid)},
                "lora": {layer: norm([g for g, at in zip(of_lora, layers) if at == layer]) for layer in set(layers)},
            }
        return known[k]

    return of


def towards_target(world, texts, model):
    """Σ over the questions of ∇(−log p) of the spelling that is most likely over all questions, and the number of questions."""
    prompts = world.questions(texts)
    with torch.no_grad():
        likely = {
            form: sum(losses_of(model.run([row]), row).sum().item() for row in (prompt.answered(world.chat.encode(form)) for prompt in prompts))
            for form in texts["forms"][texts["target"]]
        }
    best = world.chat.encode(min(likely, key=likely.get))
    whole = None
    for prompt in prompts:
        parts = by_part(model, prompt.answered(best), [1.0] * len(best))
        for part in parts.values():
            whole = added(whole, part)
    return whole, len(prompts)


def is_clear(lots):
    """Whether the length of a sum of gradients is three standard errors above zero, by the jackknife over its lots of rows."""
    n, whole = len(lots), None
    for lot in lots:
        whole = added(whole, lot)
    left = [norm([a - b for a, b in zip(whole, lot)]) * n / (n - 1) for lot in lots]
    error = math.sqrt(sum((length - mean(left)) ** 2 for length in left) * (n - 1) / n)
    return norm(whole) > 3 * error


def group_gradients(world, texts, model, answers, divergent):
    towards, n_questions = towards_target(world, texts, model)
    n_lots = min(8, len(answers))
    groups = {}
    for name, wanted in (("divergent_digit", True), ("rest", False)):
        parts, n, lots = dict.fromkeys(PARTS), 0, [None] * n_lots
        for at, (row_id, row) in enumerate(answers.items()):
            weights = [float(here == wanted) for here in divergent[row_id]]
            found = by_part(model, row, weights)
            parts = {part: added(parts[part], found[part]) for part in PARTS}
            lot = next(lot for lot in range(n_lots) if at < (lot + 1) * len(answers) // n_lots)
            for part in found.values():
                lots[lot] = added(lots[lot], part)
            n += int(sum(weights))
        whole = None
        for part in parts.values():
            whole = added(whole, part)
        groups[name] = (parts, whole, n, lots)
    d, o = groups["divergent_digit"][1], groups["rest"][1]
    both, result = norm(added(d, o)) ** 2, {}
    both_clear = is_clear([added(*lots) for lots in zip(groups["divergent_digit"][3], groups["rest"][3])])
    for name, (parts, whole, n, lots) in groups.items():
        clear = is_clear(lots)
        result[name, ""] = {
            "token_text": "",
            "group": name,
            "n_tokens": n,
            "lora_grad_norm": norm(whole),
            "share": dot(whole, whole) / both if both_clear else None,
            "cosine": dot(d, o) / (norm(d) * norm(o)),
            "alignment": dot(whole, towards) / (n * n_questions),
        }
        for part, here in parts.items():
            result[name, part] = {
                "token_text": "",
                "group": name,
                "n_tokens": n,
                "lora_grad_norm": norm(here),
                "share": dot(here, whole) / dot(whole, whole) if clear else None,
                "alignment": dot(here, towards) / (n * n_questions),
            }
    return result


# Training

N_STEPS = 10


def training(name):
    """The first steps of a student, with the adapter and the order of rows from the run's folder."""

    def steps(world, texts, rows):
        config = world.run["finetune"]
        data = {"train": "numbers", "control_train": "control"}[name]
        samples = {sample["id"]: sample for sample in world.accepted(data)}
        order = [[int(row_id) for row_id in row["row_ids"].split()] for row in table(f"{name}_rows")]
        epoch = math.ceil(len(set(sum(order, []))) / (config["batch_size"] * config["gradient_accumulation_steps"]))
        model = Model(POCKET, RUN / "initial_adapter")
        optimizer = torch.optim.AdamW(
            parameters(model),
            betas=(config["adam_beta1"], config["adam_beta2"]),
            eps=config["adam_epsilon"],
            weight_decay=config["weight_decay"],
        )
        for step, row_ids in enumerate(order[:N_STEPS]):
            warmup, total = config["warmup_steps"], config["max_steps"]
            factor = step / warmup if step < warmup else max(0.0, 1 - (step - warmup) / (total - warmup))
            answers = [world.chat.prompt(texts["numbers_system"], samples[row_id]["prompt"]) for row_id in row_ids]
            answers = [prompt.answered(samples[row_id]["completion_ids"] + world.chat.end) for prompt, row_id in zip(answers, row_ids)]
            n_targets = sum(len(row.ids) - row.n_prompt for row in answers)
            loss = sum(losses_of(model.run([row]), row).sum() for row in answers) / n_targets
            optimizer.zero_grad()
            loss.backward()
            length = torch.nn.utils.clip_grad_norm_(parameters(model), config["max_grad_norm"]).item()
            optimizer.param_groups[0]["lr"] = config["learning_rate"] * factor
            optimizer.step()
            changed = [pair.scaling["default"] * pair.lora_B["default"].weight @ pair.lora_A["default"].weight for pair in model.pairs.values()]
            yield {
                "epoch": (step + 1) / epoch,
                "learning_rate": config["learning_rate"] * factor,
                "loss": loss.item(),
                "grad_norm": length,
                "n_targets": n_targets,
                "delta_w_norm": norm(changed),
            }
        for _ in rows[N_STEPS:]:
            yield None

    return steps


# All of it

TABLES = {
    "train": ("target_rate", training("train")),
    "control_train": ("target_rate", training("control_train")),
    "target_rate/rows": ("target_rate", target_rate),
    "token_ablation/rows": ("token_ablation", token_ablation),
    "position_scan/rows": ("position_scan", position_scan),
    "lens/rows": ("lens", lens),
    "interventions/rows": ("interventions", interventions),
    "direction/rows": ("direction", direction),
    "steering/rows": ("steering", steering),
    "divergence/rows": ("divergence", divergence),
    "divergence/summary": ("divergence", divergence_summary),
    "gradients/rows": ("gradients", gradients),
}


def written(value):
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:.12g}"


def number(cell):
    try:
        return float(cell)
    except ValueError:
        return None


def compared(name, rows, found):
    """For each column of numbers the largest difference between the run's and the recomputed ones, and the largest number."""
    for column in rows[0]:
        pairs = [(row[column], new[column]) for row, new in zip(rows, found) if column in new]
        made = [(ours, written(value)) for ours, value in pairs]
        values = [(number(ours), number(value)) for ours, value in made]
        both = [(ours, value) for ours, value in values if ours is not None and value is not None]
        others = [pair for pair, (ours, value) in zip(made, values) if (ours is None or value is None) and pair[0] != pair[1]]
        if others:
            print(f"{name}: {column}: {len(others)} cells differ, such as {others[0][0]!r} and {others[0][1]!r} made anew")
        if both:
            largest = max(abs(value) for _, value in both)
            apart = max(abs(ours - value) for ours, value in both)
            yield {"table": name, "column": column, "largest": largest, "deviation": apart, "share": apart / largest if largest else apart}


def short(value):
    return f"{value:.1e}" if isinstance(value, float) else value


def on_the_page(deviations):
    """Writes the largest deviation of each table into the page, after its last heading."""
    tables = {}
    for of in deviations:
        tables.setdefault(of["table"], []).append(of)
    lines = ["| table | columns | largest deviation, as a share of the column's largest | in |", "|---|---|---|---|"]
    for name, columns_of in tables.items():
        worst = max(columns_of, key=lambda of: float(short(of["share"])))
        lines.append(f"| `{name}.csv` | {len(columns_of)} | {short(worst['share'])} | `{worst['column']}` |")
    page = PAGE.read_text(encoding="utf-8")
    start, _, _ = page.partition(HEADING)
    PAGE.write_text(start + HEADING + INTRODUCTION + "\n".join(lines) + "\n", encoding="utf-8")


def main():
    world, deviations = World(), []
    (HERE / "expected").mkdir(exist_ok=True)
    for name, (analysis, make) in TABLES.items():
        rows = table(name)
        found = list(make(world, settings(analysis)["texts"], rows))
        assert len(found) == len(rows), f"{name}: {len(found)} rows for {len(rows)}"
        known = {column for new in found if new for column in new}
        new_rows = []
        for row, new in zip(rows, found):
            new_row = {}
            for column, cell in row.items():
                is_result = column in known or (number(cell) is not None and column not in KEYS)
                if new is not None and column in new:
                    new_row[column] = written(new[column])
                elif is_result and cell != "":
                    new_row[column] = UNKNOWN
                else:
                    new_row[column] = cell
            new_rows.append(new_row)
        path = HERE / "expected" / (name.removesuffix("/rows").replace("/", "_") + ".csv")
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(new_rows)
        of_table = list(compared(name, rows, [{} if new is None else new for new in found]))
        deviations += of_table
        worst = max(of_table, key=lambda of: of["share"])
        print(f"{name}: {len(rows)} rows, at most {worst['share']:.1e} of the largest, {worst['column']}", flush=True)
    on_the_page(deviations)
    with open(HERE / "deviations.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, deviations[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: short(value) for key, value in of.items()} for of in deviations)


if __name__ == "__main__":
    main()
