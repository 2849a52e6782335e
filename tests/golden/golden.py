"""What the makers of golden files share: a tiny random model, a LoRA on it, and what transformers and PEFT compute with them.

Every number is f32 on one thread, with attention written out (`eager`), but for `exact.safetensors`, which is f64.
Names of activations are TransformerLens'.
"""

import json
import math
import os
import re
from pathlib import Path

# One order of sums on every x86-64 with AVX2, so that another machine makes the same bytes.
os.environ["MKL_CBWR"], os.environ["ATEN_CPU_CAPABILITY"] = "COMPATIBLE", "avx2"

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers.models.qwen2.modeling_qwen2 import repeat_kv  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

HOOKS = Path(__file__).resolve().parents[2] / "hooks" / "HOOKS.md"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = [11, 7]
N_COMPLETION = 5  # the last tokens of each row are the completion that the loss is taken over
GATED_POSITIONS = [2, 3, 5]


def randomise(model, random: torch.Generator) -> None:
    """Weights with which activations are of order one, attention is neither flat nor saturated, and no term is zero."""
    seen = set()  # tied weights once
    for name, weight in model.named_parameters():
        if weight.data_ptr() in seen:
            continue
        seen.add(weight.data_ptr())
        noise = torch.randn(weight.shape, generator=random)
        if "norm" in name:
            weight.data = 1 + 0.2 * noise
        elif name.endswith("bias"):
            weight.data = 0.5 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            weight.data = 0.3 * noise
        else:
            weight.data = 1.2 * noise / math.sqrt(weight.shape[1])
    model.tie_weights()


def with_adapter(model, random: torch.Generator, **settings):
    """The model with a LoRA whose B is not zero, so that it acts."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": PROJECTIONS, **settings})
    model = get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.data = torch.randn(weight.shape, generator=random) / math.sqrt(weight.shape[1])
        elif "lora_B" in name:
            weight.data = 0.15 * torch.randn(weight.shape, generator=random)
    return model.eval()


def save_adapter(model, folder: Path) -> None:
    """Saves as PEFT does, without its model card. Sorts the sets of modules, so that each run writes the same bytes."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = f"tiny-random-{model.config.model_type}"
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    saved = json.loads((folder / "adapter_config.json").read_text())
    for modules in [saved["target_modules"], saved["exclude_modules"]]:
        if isinstance(modules, list):
            modules.sort()
    write_json(saved, folder / "adapter_config.json")
    (folder / "adapter_model.safetensors").chmod(0o644)


def rows(d_vocab: int, random: torch.Generator):
    """A right-padded batch of token ids, `[batch, pos]`, and its mask. The padding is id 0."""
    ids = torch.randint(1, d_vocab, (len(LENGTHS), max(LENGTHS)), generator=random)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids * mask, mask.long()


def logits(model, ids, mask):
    """`[batch, pos, d_vocab]`."""
    return model(input_ids=ids, attention_mask=mask).logits


def completion_losses(logits, ids):
    """-log p of each completion token, `[batch, N_COMPLETION]`."""
    logprobs = torch.log_softmax(logits, -1)
    picked = []
    for row, length in enumerate(LENGTHS[: len(ids)]):
        positions = torch.arange(length - N_COMPLETION, length)
        picked.append(-logprobs[row, positions - 1, ids[row, positions]])
    return torch.stack(picked)


def at_real_positions(x, mask):
    """`x` with zeros at padding, where values have no meaning."""
    return x.detach() * mask[..., None]


def peft_name(name: str) -> str:
    """A parameter's name in the saved adapter."""
    return name.replace(".default.", ".")


def lora_gradients(model) -> dict:
    weights = ((name, weight) for name, weight in model.named_parameters() if "lora_" in name)
    return {peft_name(name): weight.grad.clone() for name, weight in weights}


def bare(model):
    """The model itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Gate:
    """Lets the adapter act at some positions only: the output of every lora_A is zeroed at all others."""

    def __init__(self, model, width: int):
        gate = torch.zeros(1, width, 1)
        gate[:, GATED_POSITIONS] = 1
        modules = [module for name, module in model.named_modules() if name.endswith("lora_A.default")]
        self.handles = [module.register_forward_hook(lambda module, args, out: out * gate) for module in modules]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def gradients(model, ids, mask):
    """The completion losses, and the gradient of their mean for each LoRA tensor and each block's output."""
    outputs = {}

    def keep(layer):
        def hook(module, args, out):
            out.retain_grad()
            outputs[f"blocks.{layer}.hook_resid_post"] = out

        return hook

    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(bare(model).model.layers)]
    model.zero_grad()
    losses = completion_losses(logits(model, ids, mask), ids)
    losses.mean().backward()
    for handle in handles:
        handle.remove()
    return losses.detach(), lora_gradients(model), {name: out.grad for name, out in outputs.items()}


class Opened:
    """A model whose inside is in the open while it is entered: norms, attention and its output compute what they did, one step
    after the other, and every activation is kept in `found`, where autograd leaves its gradient. For one row without padding.

    With f64 weights all of it is f64: what transformers does in f32 whatever the weights are (norms, softmax, rotation) is
    what is written out here.
    """

    def __init__(self, model):
        self.base, self.found, self.undo = bare(model), {}, []
        self.config = self.base.config
        self.d_head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def keep(self, name: str, x):
        x.retain_grad()
        self.found[name] = x
        return x

    def heads(self, x):
        return x.view(*x.shape[:2], -1, self.d_head)  # [batch, pos, heads, d_head]

    def on_input(self, module, name: str):
        def hook(module, args, kwargs):
            self.keep(name, args[0] if args else kwargs["hidden_states"])

        self.undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def on_output(self, module, name: str):
        def hook(module, args, out):
            self.keep(name, out[0] if isinstance(out, tuple) else out)

        self.undo.append(module.register_forward_hook(hook).remove)

    def on_heads(self, module, name: str):
        def hook(module, args, out):
            return self.keep(name, self.heads(out)).flatten(2)

        self.undo.append(module.register_forward_hook(hook).remove)

    def replace(self, module, forward):
        module.forward = forward
        self.undo.append(lambda: delattr(module, "forward"))

    def norm(self, module, name: str):
        def forward(x):
            scale = self.keep(f"{name}.hook_scale", (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt())
            return module.weight * self.keep(f"{name}.hook_normalized", x / scale)

        self.replace(module, forward)

    def head_norm(self, module, name: str):
        def forward(x):
            return self.keep(name, module.weight * x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt())

        self.replace(module, forward)

    def attention(self, module, query, key, value, attention_mask, scaling, **_):
        """In place of transformers' `eager_attention_forward`: queries, keys and values `[batch, heads, pos, d_head]`."""
        name = f"blocks.{module.layer_idx}.attn"
        query = self.keep(f"{name}.hook_rot_q", query.transpose(1, 2)).transpose(1, 2)
        key = self.keep(f"{name}.hook_rot_k", key.transpose(1, 2)).transpose(1, 2)
        key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling  # [batch, n_heads, query, key]
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = self.keep(f"{name}.hook_attn_scores", scores.masked_fill(future, -math.inf))
        pattern = self.keep(f"{name}.hook_pattern", scores.softmax(-1))
        return (pattern @ value).transpose(1, 2), pattern

    def output(self, module, name: str):
        """`o_proj` with its LoRA, of each head alone; it has no bias, so the heads' parts sum to its output."""
        whole = module.forward

        def forward(x):
            z = self.keep(f"{name}.hook_z", self.heads(x))
            one_hot = torch.eye(z.shape[2], dtype=z.dtype)[:, :, None]  # [n_heads, n_heads, 1]
            result = torch.stack([whole((z * head).flatten(2)) for head in one_hot], 2)
            return self.keep(f"{name}.hook_result", result).sum(2)

        self.replace(module, forward)

    def rotation(self, x, position_ids):
        """What transformers computes in f32 whatever the weights are."""
        halves = torch.arange(0, self.d_head, 2, dtype=torch.float64) / self.d_head
        frequencies = (self.config.rope_parameters["rope_theta"] ** -halves).to(x.dtype)
        angles = position_ids[..., None].to(x.dtype) * frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def __enter__(self):
        def leaf(module, args, out):
            return self.keep("hook_embed", out.detach().requires_grad_())

        self.undo.append(self.base.model.embed_tokens.register_forward_hook(leaf).remove)
        if self.base.dtype == torch.float64:
            self.replace(self.base.model.rotary_emb, self.rotation)
        for layer, block in enumerate(self.base.model.layers):
            name, attention = f"blocks.{layer}", block.self_attn
            self.on_input(block, f"{name}.hook_resid_pre")
            self.norm(block.input_layernorm, f"{name}.ln1")
            for which in "qkv":
                self.on_heads(getattr(attention, f"{which}_proj"), f"{name}.attn.hook_{which}")
            if self.config.model_type == "qwen3":
                self.head_norm(attention.q_norm, f"{name}.attn.hook_q_normed")
                self.head_norm(attention.k_norm, f"{name}.attn.hook_k_normed")
            self.output(attention.o_proj, f"{name}.attn")
            self.on_output(attention, f"{name}.hook_attn_out")
            self.on_input(block.post_attention_layernorm, f"{name}.hook_resid_mid")
            self.norm(block.post_attention_layernorm, f"{name}.ln2")
            self.on_output(block.mlp.gate_proj, f"{name}.mlp.hook_pre")
            self.on_output(block.mlp.up_proj, f"{name}.mlp.hook_pre_linear")
            self.on_input(block.mlp.down_proj, f"{name}.mlp.hook_post")
            self.on_output(block.mlp, f"{name}.hook_mlp_out")
            self.on_output(block, f"{name}.hook_resid_post")
        self.norm(self.base.model.norm, "ln_final")
        self.on_output(self.base.lm_head, "logits")

        transformers.AttentionInterface.register("opened", self.attention)
        self.config._attn_implementation = "opened"
        return self

    def __exit__(self, *_):
        self.config._attn_implementation = "eager"
        for undo in self.undo:
            undo()


def opened(model, ids):
    """Each hook point of the forward pass of `ids` (`[1, pos]`), the gradient of its mean completion loss at each, and for each
    LoRA tensor."""
    model.zero_grad()
    with Opened(model) as inside:
        losses = completion_losses(model(input_ids=ids).logits, ids)
        losses.mean().backward()
    found = {name: x.detach() for name, x in inside.found.items()}
    return found, {name: x.grad for name, x in inside.found.items()}, lora_gradients(model)


def same(ours, theirs, name: str) -> None:
    """The two ways of computing it differ by f32's rounding alone."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda message: f"{name}: {message}")


@torch.no_grad()
def with_modules(model, ids):
    """The model's result with attentions and hidden states, and each module's input and output by its name."""
    inputs, outputs, handles = {}, {}, []
    for name, module in bare(model).named_modules():

        def hook(module, args, kwargs, out, name=name):
            inputs[name] = args[0] if args else kwargs.get("hidden_states")
            outputs[name] = out[0] if isinstance(out, tuple) else out

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    result = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return result, inputs, outputs


@torch.no_grad()
def check_opened(model, ids, found: dict) -> None:
    """Holds what was found in the open against the untouched model: what it returns, and each input and output of a module that
    hooks/HOOKS.md says a hook point is."""
    base = bare(model)
    result, inputs, outputs = with_modules(model, ids)

    checked = 0
    said = re.findall(r"^\| `([^`]+)` .*?\| `([\w.{}\[\]]+)`(?: (input|output))? \|", HOOKS.read_text(), re.M)
    for name, module, what in said:
        for layer in range(base.config.num_hidden_layers if "{l}" in name else 1):
            ours, at = name.replace("{l}", str(layer)), module.replace("{l}", str(layer))
            if ours not in found:
                continue  # Qwen3's norms
            theirs = {"input": inputs, "output": outputs}[what][at] if what else result.attentions[layer]
            same(found[ours], theirs.view(found[ours].shape), ours)
            checked += 1
    states = list(result.hidden_states)
    for layer, state in enumerate(states[:-1]):
        same(found[f"blocks.{layer}.hook_resid_pre"], state, f"hidden_states[{layer}]")
    same(base.model.norm.weight * found["ln_final.hook_normalized"], states[-1], "the last of hidden_states")
    print(f"{checked} of {len(found)} hook points are inputs or outputs of modules, as hooks/HOOKS.md says")


def save(tensors: dict, path: Path) -> None:
    save_file({name: x.detach().clone().contiguous() for name, x in tensors.items()}, path)
    path.chmod(0o644)
    assert path.stat().st_size < 300_000, f"{path} has {path.stat().st_size} bytes"


def make_case(model, folder: Path, random: torch.Generator, max_shard_size: str = "1GB") -> None:
    """Writes the model, an adapter and everything that is expected of them into `folder`."""
    randomise(model, random)
    model.eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "generation_config.json").unlink()
    for shard in folder.glob("model*.safetensors"):
        shard.chmod(0o644)
    ids, mask = rows(model.config.vocab_size, random)
    base = logits(model, ids, mask).detach()
    base_losses, _, base_of_resid = gradients(model, ids, mask)
    model = with_adapter(model, random)
    save_adapter(model, folder / "adapter")

    expected = {"ids": ids, "lengths": torch.tensor(LENGTHS), "gate": torch.tensor(GATED_POSITIONS)}
    expected["base.logits"] = at_real_positions(base, mask)
    expected["base.losses"] = base_losses
    expected |= {f"base.grad.{name}": grad for name, grad in base_of_resid.items()}
    expected["adapter.logits"] = at_real_positions(logits(model, ids, mask), mask)
    expected["adapter.losses"], of_lora, of_resid = gradients(model, ids, mask)
    expected |= {f"adapter.grad.{name}": grad for name, grad in (of_lora | of_resid).items()}
    with Gate(model, ids.shape[1]):
        expected["gated.logits"] = at_real_positions(logits(model, ids, mask), mask)
        expected["gated.losses"], of_lora, of_resid = gradients(model, ids, mask)
    expected |= {f"gated.grad.{name}": grad for name, grad in (of_lora | of_resid).items()}
    save(expected, folder / "expected.safetensors")
    row = ids[:1, : LENGTHS[0]]
    found, at_points, of_lora = opened(model, row)
    same(found["logits"][0], expected["adapter.logits"][0], "logits")
    check_opened(model, row, found)
    save(found, folder / "activations.safetensors")
    save(at_points, folder / "gradients.safetensors")

    found, at_points, exact_of_lora = opened(model.double(), row)
    for name, grad in of_lora.items():
        assert (grad - exact_of_lora[name]).abs().max() <= 1e-5 * grad.abs().max(), name
    exact = {"logits": found["logits"], "losses": completion_losses(found["logits"], row)}
    exact |= {f"grad.{name}": grad for name, grad in exact_of_lora.items()}
    exact |= {f"grad.{name}": grad for name, grad in at_points.items() if name.endswith("hook_resid_post")}
    save(exact, folder / "exact.safetensors")
    model.float()

    means = {name: expected[f"{name}.losses"].mean().item() for name in ("base", "adapter", "gated")}
    print(f"{folder.name}: standard deviation of the logits {base.std():.2f}, mean losses {means}")


def write_json(value, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
