"""What the makers of golden files share: a tiny random model, a LoRA on it, and what transformers and PEFT compute with them.

Every number is f32 on one thread, with attention written out (`eager`). Names of activations are TransformerLens'.
"""

import json
import math
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, repeat_kv

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

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
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **{"target_modules": PROJECTIONS, **settings})
    model = get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.data = torch.randn(weight.shape, generator=random) / math.sqrt(weight.shape[1])
        elif "lora_B" in name:
            weight.data = 0.15 * torch.randn(weight.shape, generator=random)
    return model.eval()


def save_adapter(model, folder: Path) -> None:
    """As PEFT saves it, without the model card that it puts beside. Its set of modules is put in order: the same on each run."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = f"tiny-random-{model.config.model_type}"
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    saved = json.loads((folder / "adapter_config.json").read_text())
    write_json({**saved, "target_modules": sorted(saved["target_modules"])}, folder / "adapter_config.json")
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
    for row, length in enumerate(LENGTHS):
        positions = torch.arange(length - N_COMPLETION, length)
        picked.append(-logprobs[row, positions - 1, ids[row, positions]])
    return torch.stack(picked)


def at_real_positions(x, mask):
    """`x` with zeros where there is padding: what stands there has no meaning."""
    return x.detach() * mask[..., None]


def peft_name(name: str) -> str:
    """A parameter's name in the saved adapter."""
    return name.replace(".default.", ".")


def lora_gradients(model) -> dict:
    return {peft_name(name): weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


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

    blocks = model.get_base_model().model.layers
    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks)]
    model.zero_grad()
    losses = completion_losses(logits(model, ids, mask), ids)
    losses.mean().backward()
    for handle in handles:
        handle.remove()
    return losses.detach(), lora_gradients(model), {name: out.grad for name, out in outputs.items()}


@torch.no_grad()
def activations(model, ids) -> dict:
    """Every hook point of the forward pass of `ids` (`[1, pos]`). What the modules do not show is computed from what they do,
    and checked against what they go on with."""
    base = model.get_base_model()
    config = base.config
    inputs, outputs = {}, {}
    handles = []
    for name, module in base.named_modules():

        def hook(module, args, kwargs, out, name=name):
            inputs[name] = args[0] if args else kwargs.get("hidden_states")
            outputs[name] = out[0] if isinstance(out, tuple) else out

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    result = model(input_ids=ids, output_attentions=True)
    position_embeddings = base.model.rotary_emb(inputs["model.norm"], torch.arange(ids.shape[1])[None])
    for handle in handles:
        handle.remove()

    found = {"hook_embed": outputs["model.embed_tokens"], "logits": result.logits}

    def norm(ours: str, theirs: str):
        x, module = inputs[theirs], base.get_submodule(theirs)
        scale = (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
        found[f"{ours}.hook_scale"], found[f"{ours}.hook_normalized"] = scale, x / scale
        torch.testing.assert_close(module.weight * x / scale, outputs[theirs])

    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        block, ours = f"model.layers.{layer}", f"blocks.{layer}"

        def heads(x):
            return x.view(*x.shape[:2], -1, d_head)  # [batch, pos, heads, d_head]

        found[f"{ours}.hook_resid_pre"] = inputs[block]
        norm(f"{ours}.ln1", f"{block}.input_layernorm")
        q, k, v = (heads(outputs[f"{block}.self_attn.{name}_proj"]) for name in "qkv")
        found |= {f"{ours}.attn.hook_q": q, f"{ours}.attn.hook_k": k, f"{ours}.attn.hook_v": v}
        if config.model_type == "qwen3":
            q, k = (outputs[f"{block}.self_attn.{name}_norm"].view(x.shape) for name, x in (("q", q), ("k", k)))
            found |= {f"{ours}.attn.hook_q_normed": q, f"{ours}.attn.hook_k_normed": k}
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        found |= {f"{ours}.attn.hook_rot_q": q, f"{ours}.attn.hook_rot_k": k}

        n_rep = config.num_attention_heads // config.num_key_value_heads
        keys, values = (repeat_kv(x.transpose(1, 2), n_rep) for x in (k, v))
        scores = q.transpose(1, 2) @ keys.transpose(2, 3) / math.sqrt(d_head)  # [batch, n_heads, query, key]
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
        pattern = result.attentions[layer]
        torch.testing.assert_close(scores.softmax(-1), pattern)
        z = heads(inputs[f"{block}.self_attn.o_proj"])
        torch.testing.assert_close((pattern @ values).transpose(1, 2), z)
        found |= {f"{ours}.attn.hook_attn_scores": scores, f"{ours}.attn.hook_pattern": pattern, f"{ours}.attn.hook_z": z}

        # W_O with its LoRA, head by head.
        o_proj = base.get_submodule(f"{block}.self_attn.o_proj")
        w_o = (o_proj.base_layer.weight + o_proj.get_delta_weight("default")).view(-1, q.shape[2], d_head)
        found[f"{ours}.attn.hook_result"] = torch.einsum("bphd,mhd->bphm", z, w_o)
        found[f"{ours}.hook_attn_out"] = outputs[f"{block}.self_attn"]
        torch.testing.assert_close(found[f"{ours}.attn.hook_result"].sum(2), outputs[f"{block}.self_attn"])

        found[f"{ours}.hook_resid_mid"] = inputs[f"{block}.post_attention_layernorm"]
        norm(f"{ours}.ln2", f"{block}.post_attention_layernorm")
        found[f"{ours}.mlp.hook_pre"] = outputs[f"{block}.mlp.gate_proj"]
        found[f"{ours}.mlp.hook_pre_linear"] = outputs[f"{block}.mlp.up_proj"]
        found[f"{ours}.mlp.hook_post"] = inputs[f"{block}.mlp.down_proj"]
        found[f"{ours}.hook_mlp_out"] = outputs[f"{block}.mlp"]
        found[f"{ours}.hook_resid_post"] = outputs[block]
    norm("ln_final", "model.norm")
    return found


def save(tensors: dict, path: Path) -> None:
    save_file({name: x.detach().clone().contiguous() for name, x in tensors.items()}, path)
    path.chmod(0o644)
    assert path.stat().st_size < 300_000, f"{path} has {path.stat().st_size} bytes"


def make_case(model, folder: Path, random: torch.Generator, max_shard_size: str = "1GB"):
    """Writes the model, an adapter and everything that is expected of them into `folder`, and returns the adapted model."""
    randomise(model, random)
    model.eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "generation_config.json").unlink()
    for shard in folder.glob("model*.safetensors"):
        shard.chmod(0o644)
    ids, mask = rows(model.config.vocab_size, random)
    with torch.no_grad():
        base = logits(model, ids, mask)
    model = with_adapter(model, random)
    save_adapter(model, folder / "adapter")

    expected = {"ids": ids, "lengths": torch.tensor(LENGTHS), "gate": torch.tensor(GATED_POSITIONS)}
    expected["base.logits"] = at_real_positions(base, mask)
    expected["base.losses"] = completion_losses(base, ids)
    expected["adapter.logits"] = at_real_positions(logits(model, ids, mask), mask)
    expected["adapter.losses"], of_lora, of_resid = gradients(model, ids, mask)
    expected |= {f"adapter.grad.{name}": grad for name, grad in (of_lora | of_resid).items()}
    with Gate(model, ids.shape[1]):
        expected["gated.logits"] = at_real_positions(logits(model, ids, mask), mask)
        expected["gated.losses"], of_lora, _ = gradients(model, ids, mask)
    expected |= {f"gated.grad.{name}": grad for name, grad in of_lora.items()}
    save(expected, folder / "expected.safetensors")
    row = ids[:1, : LENGTHS[0]]
    found = activations(model, row)
    torch.testing.assert_close(found["logits"][0], expected["adapter.logits"][0])
    save(found, folder / "activations.safetensors")

    means = {name: expected[f"{name}.losses"].mean().item() for name in ("base", "adapter", "gated")}
    print(f"{folder.name}: standard deviation of the logits {base.std():.2f}, mean losses {means}")
    return model, ids, mask


def write_json(value, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
