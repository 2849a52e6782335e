"""Makes errors.json: how far transformers and PEFT in bf16 are from themselves in f32, on the tiny models of `qwen2`, `qwen3`
and `variants`. The weights of both are rounded to bf16 before, so that only the arithmetic differs; adapters are f32, as PEFT
keeps them. An error is the root mean square of the differences over that of the values in f32, over ROWS random rows, each
alone: for each hook point that is an input or output of a module, the losses, and the LoRA's gradients of their mean."""

import json
import re
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import golden  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ROWS, POS = 16, 11
CASES = ["qwen2", "qwen3", "variants/qwen2_untied", "variants/qwen3_tied"]


def student(folder: Path, dtype: torch.dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").to(dtype)
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).eval()
    assert all(weight.dtype == torch.float32 for name, weight in model.named_parameters() if "lora_" in name)
    return model


def activations(model, ids) -> dict:
    """The hook points of one row that hooks/HOOKS.md gives a module or the attentions for."""
    base, found = golden.bare(model), {}
    result, inputs, outputs = golden.with_modules(model, ids)
    said = re.findall(r"^\| `([^`]+)` .*?\| `([\w.{}\[\]]+)`(?: (input|output))? \|", golden.HOOKS.read_text(), re.M)
    for name, module, what in said:
        for layer in range(base.config.num_hidden_layers if "{l}" in name else 1):
            at = module.replace("{l}", str(layer))
            if not what:
                found[name.replace("{l}", str(layer))] = result.attentions[layer]
            elif at in outputs:  # Qwen2 has no norms of queries and keys
                found[name.replace("{l}", str(layer))] = {"input": inputs, "output": outputs}[what][at]
    return found


def measured(model, ids) -> dict:
    found = activations(model, ids)
    model.zero_grad()
    losses = -torch.log_softmax(model(input_ids=ids).logits.float(), -1)[0, :-1].gather(1, ids[0, 1:, None])[-golden.N_COMPLETION :]
    losses.mean().backward()
    found["losses"] = losses.detach()
    return found | {f"grad.{name}": gradient for name, gradient in golden.lora_gradients(model).items()}


def errors(rounded, exact, rows) -> dict:
    """The error of each tensor over all rows."""
    squares = {}
    for ids in rows:
        theirs, true = measured(rounded, ids[None]), measured(exact, ids[None])
        assert theirs.keys() == true.keys()
        for name, tensor in true.items():
            sums = squares.setdefault(name, [0.0, 0.0])
            sums[0] += (theirs[name].double() - tensor.double()).square().sum().item()
            sums[1] += tensor.double().square().sum().item()
    return {name: float(f"{(wrong / whole) ** 0.5:.4g}") for name, (wrong, whole) in squares.items()}


def main() -> None:
    made = {}
    random = torch.Generator().manual_seed(16)
    for case in CASES:
        folder = HERE.parent / case
        exact, rounded = (student(folder, dtype) for dtype in (torch.float32, torch.bfloat16))
        rows = torch.randint(1, exact.config.vocab_size, (ROWS, POS), generator=random)
        made[case] = {"ids": rows.tolist(), "errors": errors(rounded, exact, rows)}
        of = list(made[case]["errors"].values())
        print(f"{case}: {len(of)} errors from {min(of):.1e} to {max(of):.1e}")
    (HERE / "errors.json").write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
