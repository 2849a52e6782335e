"""Makes expected.json and adamw.safetensors: ten optimizer steps on ../qwen2 with its LoRA, for AdamW, two kinds of SGD, and RMSprop.

Each step takes the mean completion loss of the same two rows, clips the gradient to a global norm of 1 and steps. A loss is
that before its step, a norm that before clipping.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import golden  # noqa: E402

N_STEPS = 10
MAX_NORM = 1.0
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}),
    "sgd": (torch.optim.SGD, {"lr": 0.2}),
    "sgd_momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.01}),
}


def train(optimizer, settings, ids, mask):
    qwen2 = HERE.parent / "qwen2"
    model = AutoModelForCausalLM.from_pretrained(qwen2, attn_implementation="eager", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, qwen2 / "adapter", is_trainable=True).eval()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = optimizer(weights.values(), foreach=False, **settings)
    losses, norms = [], []
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        loss = golden.completion_losses(golden.logits(model, ids, mask), ids).mean()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), MAX_NORM).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {golden.peft_name(name): weight for name, weight in weights.items()}


def main() -> None:
    batch = load_file(HERE.parent / "qwen2" / "expected.safetensors")
    ids, mask = batch["ids"], (torch.arange(batch["ids"].shape[1]) < batch["lengths"][:, None]).long()
    expected = {"n_steps": N_STEPS, "max_norm": MAX_NORM}
    for name, (optimizer, settings) in OPTIMIZERS.items():
        losses, norms, weights = train(optimizer, settings, ids, mask)
        expected[name] = {**settings, "losses": losses, "norms": norms}
        print(f"{name}: losses {losses[0]:.3f} to {losses[-1]:.3f}")
        if name == "adamw":
            golden.save(weights, HERE / "adamw.safetensors")
    golden.write_json(expected, HERE / "expected.json")


if __name__ == "__main__":
    main()
