"""Makes the books of the run in kept/ anew with transformers, PEFT and PyTorch, by the definitions in docs/ledger.md.

From undertone it takes only the files of the run's folder: settings and texts, rows and their order, the first adapter, the teacher's
weights, and which lines each table has. It repeats both trainings with torch.optim.AdamW in f64. An entry is the inner product of one
token's gradient, by autograd, with the adjoint by its double sum over steps; nothing is gathered backwards, and there is no tangent.
It writes the numbers to expected/ and prints how far kept/ is from them.

    python make.py            (transformers, peft and torch: ../requirements.txt)

kept/ itself is made by

    undertone run experiment.toml --run kept && find kept -name '*.svg' -delete && rm kept/report.html

Its tables are not committed: this script has the program make them first.
"""

import csv
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.dont_write_bytecode = True
spec = importlib.util.spec_from_file_location("redo", HERE.parent / "recompute" / "make.py")
redo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(redo)
redo.RUN = HERE / "kept"

POINTS = {1: [(0.5, 1.0)], 2: [(0.5 - 0.5 / math.sqrt(3), 0.5), (0.5 + 0.5 / math.sqrt(3), 0.5)]}
DATA = {"student": "numbers", "control": "control"}
LOGS = {"student": "train_rows", "control": "control_train_rows"}
GROUPS = {
    "all": lambda entry: True,
    "first_digit": lambda entry: entry["group"] == "first_digit",
    "later_digit": lambda entry: entry["group"] == "later_digit",
    "other": lambda entry: entry["group"] == "other",
    "divergent_digit": lambda entry: entry["nief"] and entry["group"] != "other",
    "same_digit": lambda entry: not entry["nief"] and entry["group"] != "other",
}


class Measure:
    """A function of the adapter: the mean margin over questions, or the mean loss on rows of numbers."""

    def __init__(self, world, texts, word):
        self.word, self.chat = word, world.chat
        if word == "numbers":
            held = world.accepted("numbers")[len(world.learned) :][: world.run["measure"]["ledger"]["numbers"]]
            prompts = [(world.chat.prompt(texts["numbers_system"], sample["prompt"]), sample) for sample in held]
            self.rows = [prompt.answered(sample["completion_ids"] + world.chat.end) for prompt, sample in prompts]
            self.n = sum(len(row.ids) - row.n_prompt for row in self.rows)
        else:
            target = redo.Target({**texts, "target": word}, world.chat)
            self.forms, self.n_others = target.forms, len(target.members) - 1
            self.rows = world.questions(texts)

    def terms(self, model):
        """For each question or row: rows that are run, and the value as a function of their logits."""
        for row in self.rows:
            if self.word == "numbers":
                yield [row], lambda logits, row=row: redo.losses_of(logits, row).sum() / self.n
            else:
                yield [row.answered(list(form)) for _, form in self.forms], self.margin

    def margin(self, logits):
        logprobs, own, others = logits.log_softmax(-1), [], []
        for at, (word, form) in enumerate(self.forms):
            from_ = self.n_prompt - 1
            logp = sum(logprobs[at, from_ + k, token] for k, token in enumerate(form))
            (own if word == self.word else others).append(logp)
        margin = torch.stack(own).logsumexp(0) - torch.stack(others).logsumexp(0) + math.log(self.n_others)
        return margin / len(self.rows)

    def value(self, model):
        with torch.no_grad():
            return sum(self.of(rows, of, model).item() for rows, of in self.terms(model))

    def of(self, rows, of, model):
        self.n_prompt = rows[0].n_prompt
        return of(model.run(rows))

    def gradient(self, model):
        """Split by the part of the chat where the adapter reads, `part: [tensor]`."""
        found = None
        for rows, of in self.terms(model):
            here = by_part(model, rows, lambda logits, rows=rows, of=of: self.of_logits(rows, of, logits))
            found = here if found is None else {part: redo.added(found[part], here[part]) for part in here}
        return found

    def of_logits(self, rows, of, logits):
        self.n_prompt = rows[0].n_prompt
        return of(logits)


def by_part(model, rows, of):
    """The gradient of a function of some rows' logits, split by the part of the chat at which the adapter's input stands."""
    inputs, inner, outer, handles = {}, {}, {}, []
    for place, pair in model.pairs.items():

        def of_a(_, args, out, place=place):
            inputs[place], inner[place] = args[0], out

        def of_b(_, __, out, place=place):
            out.retain_grad()
            outer[place] = out

        handles.append(pair.lora_A["default"].register_forward_hook(of_a))
        handles.append(pair.lora_B["default"].register_forward_hook(of_b))
    of(model.run(rows)).backward()
    for handle in handles:
        handle.remove()
    width = max(len(row.ids) for row in rows)
    found = {}
    for part in redo.PARTS:
        is_in = redo.UNIONS.get(part, lambda c, part=part: c == part)
        here = torch.tensor([[is_in(c) for c in row.classes] + [False] * (width - len(row.ids)) for row in rows], dtype=torch.float64)
        found[part] = []
        for place, pair in model.pairs.items():
            back = outer[place].grad * here[..., None]  # [row, pos, d_out]
            to_a = torch.einsum("rpo,ok,rpi->ki", back, pair.lora_B["default"].weight, inputs[place])
            found[part] += [to_a.detach(), torch.einsum("rpo,rpk->ok", back, inner[place]).detach()]
    model.qwen.zero_grad()
    return found


def path(world, texts, who):
    """A student's training: the states, and of each step its rows, rate, clipping and scales."""
    config, samples = world.run["finetune"], {sample["id"]: sample for sample in world.accepted(DATA[who])}
    order = [[int(row_id) for row_id in row["row_ids"].split()] for row in redo.table(LOGS[who])]
    model = redo.Model(redo.POCKET, redo.RUN / "initial_adapter")
    tensors = redo.parameters(model)
    beta1, beta2, eps = config["adam_beta1"], config["adam_beta2"], config["adam_epsilon"]
    optimizer = torch.optim.AdamW(tensors, betas=(beta1, beta2), eps=eps, weight_decay=config["weight_decay"])
    states, steps = [[tensor.detach().clone() for tensor in tensors]], []
    for step, row_ids in enumerate(order):
        rows = []
        for row_id in row_ids:
            prompt, end = world.chat.prompt(texts["numbers_system"], samples[row_id]["prompt"]), world.chat.end
            rows.append((row_id, prompt.answered(samples[row_id]["completion_ids"] + end)))
        n_targets = sum(len(row.ids) - row.n_prompt for _, row in rows)
        optimizer.zero_grad()
        (sum(redo.losses_of(model.run([row]), row).sum() for _, row in rows) / n_targets).backward()
        length = torch.nn.utils.clip_grad_norm_(tensors, config["max_grad_norm"]).item()
        warmup, total = config["warmup_steps"], config["max_steps"]
        rate = config["learning_rate"] * (step / warmup if step < warmup else max(0.0, 1 - (step - warmup) / (total - warmup)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        second = [optimizer.state[tensor]["exp_avg_sq"] / (1 - beta2 ** (step + 1)) for tensor in tensors]
        scales = [1 / (moment.sqrt() + eps) for moment in second]
        clip = min(1.0, config["max_grad_norm"] / (length + 1e-6))
        steps.append({"rows": rows, "n": n_targets, "rate": rate, "clip": clip, "scales": scales})
        states.append([tensor.detach().clone() for tensor in tensors])
    return model, states, steps


def at(model, state):
    with torch.no_grad():
        for tensor, value in zip(redo.parameters(model), state):
            tensor.copy_(value)
    return model


def adjoint(gradients, steps, beta, s):
    """a_s = Σ_{t ≥ s} η_t (1 − β) β^{t−s} / (1 − β^{t+1}) D_t G_t, for each part where the measure reads."""
    found = {}
    for part in redo.PARTS:
        found[part] = [torch.zeros_like(tensor) for tensor in steps[0]["scales"]]
        for t in range(s, len(steps)):
            factor = steps[t]["rate"] * (1 - beta) * beta ** (t - s) / (1 - beta ** (t + 1))
            for sum_, scale, gradient in zip(found[part], steps[t]["scales"], gradients[t][part]):
                sum_ += factor * scale * gradient
    return found


def total(parts):
    return [sum(tensors) for tensors in zip(*parts.values())]


def predictions(world, texts, row, sample):
    """The probabilities of base and teacher at each token of an answer."""
    start = row.n_prompt - 1
    with torch.no_grad():
        base = world.models["base"].run([row])[0].softmax(-1)[start:-1]
        in_teacher = world.chat.prompt(texts["teacher_system"], sample["prompt"])
        in_teacher = in_teacher.answered(sample["completion_ids"] + world.chat.end)
        teacher = world.teacher.run([in_teacher])[0].softmax(-1)[in_teacher.n_prompt - 1 : -1]
    return base, teacher


def books(world, texts, who, words):
    """The lines of entries, parts and summary of one training, for each word's measure."""
    model, states, steps = path(world, texts, who)
    beta, decay_rate = world.run["finetune"]["adam_beta1"], world.run["finetune"]["weight_decay"]
    samples = {sample["id"]: sample for sample in world.accepted(DATA[who])}
    for word in words:
        measure = Measure(world, texts, word)
        change = measure.value(at(model, states[-1])) - measure.value(at(model, states[0]))
        gradients, decay = [], 0.0
        for t, step in enumerate(steps):
            mean = None
            for u, weight in POINTS[world.run["measure"]["ledger"]["points"]]:
                state = [a + u * (b - a) for a, b in zip(states[t], states[t + 1])]
                here = measure.gradient(at(model, state))
                here = {part: [weight * tensor for tensor in tensors] for part, tensors in here.items()}
                mean = here if mean is None else {part: redo.added(mean[part], here[part]) for part in here}
            gradients.append(mean)
            decay -= step["rate"] * decay_rate * redo.dot(total(mean), states[t])
        entries, parts = [], []
        for s, step in enumerate(steps):
            a = adjoint(gradients, steps, beta, s)
            along, booked = total(a), {}
            at(model, states[s])
            for row_id, row in step["rows"]:
                base, teacher = predictions(world, texts, row, samples[row_id])
                places = redo.places(world, row.ids[row.n_prompt :])
                for k, token in enumerate(row.ids[row.n_prompt :]):
                    logprobs = model.run([row])[0, row.n_prompt - 1 + k].log_softmax(-1)
                    factor = step["clip"] / step["n"]

                    def entry(of):
                        return factor * redo.dot(along, torch.autograd.grad(of, redo.parameters(model), retain_graph=True))

                    student = logprobs.detach().exp()
                    entries.append({
                        "model": who, "target": word, "measure": "loss" if word == "numbers" else "margin",
                        "step": s + 1, "row_id": row_id, "k": k, "token_id": token,
                        "group": "other" if places[k][1] is None else "later_digit" if places[k][1] else "first_digit",
                        "nief": bool(teacher[k].argmax() != base[k].argmax()),
                        "schrodi": bool(teacher[k].argmax() == token and base[k].argmax() != token),
                        "p_teacher": teacher[k][token].item(), "p_base": base[k][token].item(), "p_student": student[token].item(),
                        "pmax_teacher": teacher[k].max().item(), "pmax_base": base[k].max().item(), "pmax_student": student.max().item(),
                        "loss": -logprobs[token].item() / step["n"],
                        "entry": entry(logprobs[token]),
                        "entry_teacher": entry((teacher[k] * logprobs).sum()),
                        "entry_base": entry((base[k] * logprobs).sum()),
                    })  # fmt: skip
                weight = -step["clip"] / step["n"]
                here = by_part(model, [row], lambda logits, row=row: weight * redo.losses_of(logits, row).sum())
                for written, tensors in here.items():
                    for read in redo.PARTS:
                        for at_pair, place in enumerate(model.pairs):
                            two = slice(2 * at_pair, 2 * at_pair + 2)
                            key = (written, read, *place)
                            booked[key] = booked.get(key, 0.0) + redo.dot(tensors[two], a[read][two])
            parts += [
                {"model": who, "target": word, "step": s + 1, "written": written, "read": read, "layer": layer, "proj": f"{proj}_proj", "booked": value}
                for (written, read, layer, proj), value in booked.items()
            ]
        yield entries, parts, list(summary(who, word, entries, decay, change))


def summary(who, word, entries, decay, change):
    rows = {entry["row_id"] for entry in entries}

    def of(chosen, column):
        sums = [sum(column(entry) for entry in chosen if entry["row_id"] == row) for row in rows]
        return sum(sums), redo.standard_error(sums) * len(rows)

    for group, belongs in GROUPS.items():
        chosen = [entry for entry in entries if belongs(entry)]
        if not chosen:
            continue
        found = {
            "booked": of(chosen, lambda entry: entry["entry"]),
            "teacher": of(chosen, lambda entry: entry["entry_teacher"]),
            "pull": of(chosen, lambda entry: entry["entry_base"]),
        }
        if who == "student":  # the teacher wrote its rows
            found["drive"] = of(chosen, lambda entry: entry["entry_teacher"] - entry["entry_base"])
            found["luck"] = of(chosen, lambda entry: entry["entry"] - entry["entry_teacher"])
        else:
            found["luck"] = of(chosen, lambda entry: entry["entry"] - entry["entry_base"])
        yield {
            "model": who, "target": word, "group": group, "n_tokens": len(chosen), "share": len(chosen) / len(entries),
            "share_of_loss": sum(entry["loss"] for entry in chosen) / sum(entry["loss"] for entry in entries),
            **{name: value for name, (value, _) in found.items()},
            **{f"{name}_se": error for name, (_, error) in found.items()},
            "change": change,
        }  # fmt: skip
    booked = sum(entry["entry"] for entry in entries)
    yield {"model": who, "target": word, "group": "weight_decay", "booked": decay, "change": change}
    print(f"{who}, {word}: {change:+.6f}, of which {change - booked - decay:+.1e} are not booked", flush=True)


KEYS = {
    "entries": ["model", "target", "step", "row_id", "k"],
    "parts": ["model", "target", "step", "written", "read", "layer", "proj"],
    "summary": ["model", "target", "group"],
}


def main():
    program = HERE.parents[2] / "target" / "release" / "undertone"
    subprocess.run([program, "measure", "kept", "ledger", "--force"], cwd=HERE, check=True)
    world = redo.World()
    settings = redo.settings("ledger")
    world.learned = world.accepted("numbers")[: len(world.accepted("numbers")) - world.run["generate"]["n_heldout"]]
    world.learned = world.learned[: min(world.run["generate"]["n_keep"], len(world.accepted("control")))]
    words = [settings["texts"]["target"], "numbers"]
    found = {"entries": [], "parts": [], "summary": []}
    for who in DATA:
        for tables in books(world, settings["texts"], who, words):
            for name, rows in zip(found, tables):
                found[name] += rows
    (HERE / "expected").mkdir(exist_ok=True)
    for name, rows in found.items():
        by_key = {tuple(str(row[key]) for key in KEYS[name]): row for row in rows}
        kept = [row for row in redo.table(f"ledger/{name}") if row.get("group") != "residual"]
        assert len(kept) == len(by_key), f"{name}: {len(kept)} lines for {len(by_key)}"
        ordered = [by_key[tuple(row[key] for key in KEYS[name])] for row in kept]
        columns = list(dict.fromkeys(column for row in ordered for column in row))
        with open(HERE / "expected" / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({column: written(value) for column, value in row.items()} for row in ordered)
        for column in columns:
            for word in words:
                rows = [(row, kept_row) for row, kept_row in zip(ordered, kept) if column in row and row["target"] == word]
                pairs = [(row[column], kept_row[column]) for row, kept_row in rows]
                if isinstance(pairs[0][0], float):
                    apart = max(abs(ours - float(theirs)) for ours, theirs in pairs)
                    print(f"{name} {column} of {word}: {apart:.1e} of {max(abs(ours) for ours, _ in pairs):.1e}")
                else:
                    assert all(written(ours) == theirs for ours, theirs in pairs), f"{name} {column}"


def written(value):
    return str(value).lower() if isinstance(value, bool) else f"{value:.8g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
