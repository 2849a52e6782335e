"""The peers' side of the benchmark: PEFT, transformers and TransformerLens as they are used, told by the same lines of JSON as ours.

Each is given what is good for it: prompts sorted by length, no gradients where none are needed, the older and faster of
TransformerLens' two models.
"""

import json
import os
import sys
import time
from pathlib import Path

LINES = os.fdopen(os.dup(1), "w")  # what libraries print goes to the other stream
os.dup2(2, 1)
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Timed:
    """Seconds, and those that this process' threads ran, once the device is done."""

    def __init__(self, device):
        self.device = device

    def wait(self):
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def __enter__(self):
        self.wait()
        self.seconds, self.cpu_seconds = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.wait()
        self.seconds, self.cpu_seconds = time.perf_counter() - self.seconds, time.process_time() - self.cpu_seconds


def reply(timed, **more):
    return {"seconds": [t.seconds for t in timed], "cpu_seconds": [t.cpu_seconds for t in timed], **more}


def counted(d_vocab, n, prompt, completion):
    """As data::counted_rows."""
    width = prompt + completion
    ids = [[((row * width + at) * 7919 + 13) % d_vocab for at in range(width)] for row in range(n)]
    return [{"ids": row, "targets": [at >= prompt for at in range(width)]} for row in ids]


class Peer:
    def open(self, folder, device, dtype, threads):
        torch.set_num_threads(threads)
        self.folder, self.device = Path(folder), device
        self.dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).to(device).eval()
        self.data = json.loads((self.folder / "bench.json").read_text())
        self.adapted = None
        return {}

    def rows(self, rows, of="rows"):
        if "numbers" in rows:
            first, n = rows["numbers"]["first"], rows["numbers"]["n"]
            return self.data[of][first : first + n]
        counted_rows = counted(self.model.config.vocab_size, **rows["counted"])
        return counted_rows if of == "rows" else [row["ids"] for row in counted_rows]

    def adapter(self, name):
        """The model with an adapter of the folder, its tensors as they were saved. The model itself stays wrapped from then on."""
        from peft import PeftModel, set_peft_model_state_dict
        from safetensors.torch import load_file

        folder = self.folder / f"adapter-{name}"
        if self.adapted is None:
            self.adapted = PeftModel.from_pretrained(self.model, folder, is_trainable=True)
        set_peft_model_state_dict(self.adapted, load_file(folder / "adapter_model.safetensors", device=self.device))
        return self.adapted.eval()  # no dropout

    def train(self, rows, rank, steps):
        """A plain loop as TRL's trainer has it: padded on the right, labels of -100, transformers' own loss."""
        assert rank == 8, "the saved adapter is of rank 8"
        model, rows = self.adapter("fresh"), self.rows(rows)
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
        width = max(len(row["ids"]) for row in rows)
        pad = lambda values, with_: torch.tensor([v + [with_] * (width - len(v)) for v in values], device=self.device)  # noqa: E731
        ids = pad([row["ids"] for row in rows], 0)
        mask = pad([[1] * len(row["ids"]) for row in rows], 0)
        labels = [[i if t else -100 for i, t in zip(row["ids"], row["targets"])] for row in rows]
        labels = pad(labels, -100)
        timed, losses, norms = [], [], []
        for _ in range(steps):
            with Timed(self.device) as t:
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                norms.append(norm.item())
            timed.append(t)
        return reply(timed, losses=losses, grad_norms=norms, tokens=sum(len(row["ids"]) for row in rows))

    @torch.inference_mode()
    def generate(self, prompts, batch, max_new_tokens, temperature, stop, seed):
        torch.manual_seed(seed)
        prompts = self.rows(prompts, "prompts")
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        ends = self.data.get("stop", []) if stop else []
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        how |= {"eos_token_id": ends} if ends else {"eos_token_id": None, "min_new_tokens": max_new_tokens}
        answers = [None] * len(prompts)
        with Timed(self.device) as t:
            for at in range(0, len(prompts), batch):
                chosen = order[at : at + batch]
                width = max(len(prompts[row]) for row in chosen)
                ids = torch.tensor([[0] * (width - len(prompts[row])) + prompts[row] for row in chosen], device=self.device)
                lengths = torch.tensor([len(prompts[row]) for row in chosen], device=self.device)
                mask = (torch.arange(width, device=self.device) >= width - lengths[:, None]).long()
                found = self.model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=0, **how
                )
                for row, answer in zip(chosen, found[:, width:].tolist()):
                    answers[row] = answer
        n_tokens = 0
        for row, answer in enumerate(answers):
            end = next((at for at, token in enumerate(answer) if token in ends), None)
            n_tokens += len(answer) if end is None else end + 1
            answers[row] = answer[:end]
        return reply([t], n_tokens=n_tokens, n_answers=len(answers), answers=answers)

    @torch.inference_mode()
    def gates(self, n_questions, n_gates, token_by_token):
        """Chunked prefill: the adapter is enabled or disabled for the tokens up to the next switch. With `token_by_token`, as it is
        published: after the first switch each token is a forward pass of its own."""
        model, wanted = self.adapter("acting"), torch.tensor(self.data["target_ids"], device=self.device)
        found = []
        with Timed(self.device) as t:
            for gate in self.data["gates"][:n_gates]:
                found.append([])
                for ids, acts in zip(self.data["questions"][:n_questions], gate["acts"]):
                    logits = self.chunked(model, torch.tensor([ids], device=self.device), acts, token_by_token)
                    found[-1].append(logits.float().log_softmax(-1)[wanted].tolist())
        return reply([t], logprobs=found)

    def chunked(self, model, ids, acts, token_by_token):
        past, at = None, 0
        while at < len(acts):
            end = at + 1
            while end < len(acts) and acts[end] == acts[at] and not (token_by_token and at > 0):
                end += 1
            run = lambda: model(input_ids=ids[:, at:end], past_key_values=past, use_cache=True, logits_to_keep=1)  # noqa: B023, E731
            if acts[at]:
                out = run()
            else:
                with model.disable_adapter():
                    out = run()
            past, at = out.past_key_values, end
        return out.logits[0, -1]

    def token_gradients(self, rows):
        model, rows = self.adapter("acting"), self.rows(rows)
        parameters = [p for p in model.parameters() if p.requires_grad]
        timed, norms = [], []
        for row in rows:
            with Timed(self.device) as t:
                ids = torch.tensor([row["ids"]], device=self.device)
                logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
                of_row = []
                for at in (at for at, target in enumerate(row["targets"]) if target):
                    found = torch.autograd.grad(-logprobs[at - 1, row["ids"][at]], parameters, retain_graph=True)
                    of_row.append(torch.stack([g.norm() for g in found]).norm().item())
            timed.append(t)
            norms.append(of_row)
        return reply(timed, norms=norms)

    @torch.inference_mode()
    def activations(self, rows, pos, see, repeats):
        """`bare`, `resid_post`: transformers; `lens`, `lens_resid_post`: TransformerLens, all or some of what it caches."""
        ids = torch.tensor([row["ids"] for row in counted(self.model.config.vocab_size, rows, pos, 0)], device=self.device)
        run = getattr(self, "see_" + see)
        timed = []
        for _ in range(repeats):
            logits = resid = None  # the last repeat's are freed before the clock starts
            with Timed(self.device) as t:
                logits, resid = run(ids)
            timed.append(t)
        length = lambda x: x.double().norm().item()  # noqa: E731
        return reply(timed, logits_norm=length(logits), resid_norms=[length(x) for x in resid])

    def see_bare(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits, []

    def see_resid_post(self, ids):
        found = {}

        def keep(layer):
            def hook(module, args, out):
                found[layer] = out

            return hook

        handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(self.model.model.layers)]
        logits = self.model(input_ids=ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return logits, [found[layer] for layer in sorted(found)]

    def see_lens_bare(self, ids):
        return self.lens()(ids), []

    def see_lens(self, ids):
        logits, cache = self.lens().run_with_cache(ids)
        return logits, [cache[name] for name in self.resid_names()]

    def see_lens_resid_post(self, ids):
        logits, cache = self.lens().run_with_cache(ids, names_filter=self.resid_names())
        return logits, [cache[name] for name in self.resid_names()]

    def resid_names(self):
        return [f"blocks.{layer}.hook_resid_post" for layer in range(self.model.config.num_hidden_layers)]

    def lens(self):
        if not hasattr(self, "hooked"):
            self.hooked = lens_of(self.model, self.device)
        return self.hooked


def lens_of(model, device):
    """TransformerLens' HookedTransformer of a Qwen2, nothing folded and nothing centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_qwen2_weights

    c = model.config
    d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    config = HookedTransformerConfig(
        d_model=c.hidden_size,
        d_head=d_head,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        n_layers=c.num_hidden_layers,
        n_ctx=512,
        eps=c.rms_norm_eps,
        d_vocab=c.vocab_size,
        act_fn=c.hidden_act,
        use_attn_scale=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_base=int(c.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        rotary_dim=d_head,
        final_rms=True,
        gated_mlp=True,
        device=device,
    )
    lens = HookedTransformer(config)
    keep = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    lens.load_and_process_state_dict(convert_qwen2_weights(model, config), **keep)
    return lens.eval()


def peak_mib(device):
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main():
    peer = Peer()
    for line in sys.stdin:
        request = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            answer = getattr(peer, request.pop("do"))(**request)
            answer["peak_mib"] = peak_mib(peer.device)
        except Exception as error:  # told to the driver, which stops
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=LINES, flush=True)


if __name__ == "__main__":
    main()
