"""Makes expected.json and adamw.safetensors: ten optimizer steps on ../qwen2 with its LoRA, for AdamW, two kinds of SGD, RMSprop,
Muon, and SGD with the scales of a first epoch of AdamW (of one step here), which is taken back.

Each step takes the mean completion loss of the same two rows, clips the gradient to a global norm of 1 and steps. A loss is
that before its step, a norm that before clipping.

Of Muon ten steps on two matrices along given gradients: it makes directions as long as others that a gradient has by rounding alone,
so that two trainings of a model drift apart.
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
    "preconditioned": (torch.optim.SGD, {"lr": 2e-5, "betas": (0.9, 0.999), "eps": 1e-8}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.01}),
}


def train(optimizer, settings, ids, mask):
    qwen2 = HERE.parent / "qwen2"
    model = AutoModelForCausalLM.from_pretrained(qwen2, attn_implementation="eager", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, qwen2 / "adapter", is_trainable=True).eval()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def gradients():
        model.zero_grad()
        loss = golden.completion_losses(golden.logits(model, ids, mask), ids).mean()
        loss.backward()
        return loss.item(), torch.nn.utils.clip_grad_norm_(weights.values(), MAX_NORM).item()

    scales = {}
    if "betas" in settings and optimizer is torch.optim.SGD:
        start = {name: weight.detach().clone() for name, weight in weights.items()}
        scout = torch.optim.AdamW(weights.values(), foreach=False, weight_decay=0.0, **settings)
        gradients()
        scout.step()
        scales = {name: (scout.state[weight]["exp_avg_sq"] + 1e-8).sqrt() for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(start[name])
        settings = {"lr": settings["lr"]}
    optimizer = optimizer(weights.values(), foreach=False, **settings)
    losses, norms = [], []
    for _ in range(N_STEPS):
        loss, norm = gradients()
        for name, scale in scales.items():
            weights[name].grad.div_(scale)
        optimizer.step()
        losses.append(loss)
        norms.append(norm)
    return losses, norms, {golden.peft_name(name): weight for name, weight in weights.items()}


def muon():
    settings = {"lr": 1e-2, "momentum": 0.95, "weight_decay": 0.1}
    torch.manual_seed(1)
    matrices = [torch.randn(3, 5), torch.randn(6, 2)]
    start = [matrix.flatten().tolist() for matrix in matrices]
    gradients = [[torch.randn_like(matrix) for matrix in matrices] for _ in range(N_STEPS)]
    optimizer = torch.optim.Muon(matrices, **settings)
    for step in gradients:
        for matrix, gradient in zip(matrices, step):
            matrix.grad = gradient
        optimizer.step()
    flat = lambda tensors: [tensor.flatten().tolist() for tensor in tensors]
    return {**settings, "start": start, "gradients": [flat(step) for step in gradients], "end": flat(matrices)}


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
    expected["muon"] = muon()
    golden.write_json(expected, HERE / "expected.json")


if __name__ == "__main__":
    main()
