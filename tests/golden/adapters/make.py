"""Makes a folder for each kind of LoRA on ../variants/qwen2_untied as PEFT saves it, and expected.safetensors with the logits of all.

Beside each, saved.json is the adapter_config.json that undertone writes when it has read the folder (tests/adapters.rs holds it to
that, and the tensors to PEFT's bits). It is loaded with PEFT here, so that what undertone saves is what PEFT can load.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import golden  # noqa: E402

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

KINDS = {
    "rslora": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "rank_pattern": {
        "target_modules": ["k_proj", "v_proj", "gate_proj"],
        "rank_pattern": {"model.layers.1.self_attn.v_proj": 5, "gate_proj": 3, "v_proj": 2},
    },
    "alpha_pattern": {
        "target_modules": ["o_proj", "up_proj"],
        "alpha_pattern": {"layers.0.mlp.up_proj": 3, "o_proj": 0.5},
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layer_by_pattern": {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "all_linear": {"target_modules": "all-linear", "r": 2, "lora_alpha": 3},
    "all_at_once": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"v_proj": 2, "model.layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"v_proj": 3},
        "use_rslora": True,
    },
    "first_pattern": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2, "model.layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"q_proj": 3, "layers.1.self_attn.q_proj": 5, r"^model\.layers\.0\.mlp\..*": 2, "p_proj": 7},
    },
    "expression": {
        "target_modules": r"(?:.*?(?:vision|text).*?(?:attn|mlp).*?(?:q_proj|down_proj))"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|down_proj)))",
        "exclude_modules": r".*layers\.0\.mlp.*",
    },
    "excluded": {
        "target_modules": ["q_proj", "v_proj", "up_proj", "query_key_value"],
        "exclude_modules": ["v_proj", "layers.1.self_attn.q_proj", "score"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "model.layers"],
    },
    "lookahead": {"target_modules": r"model\.layers\.\d+\.(?!mlp).*\.(k_proj|o_proj)"},
}
PATTERNS = ["rank_pattern", "alpha_pattern"]


def base():
    return AutoModelForCausalLM.from_pretrained(
        HERE.parent / "variants" / "qwen2_untied", attn_implementation="eager", dtype=torch.float32
    )


def as_undertone_saves(folder: Path):
    """The model with the adapter that has undertone's config, or nothing where there is none yet."""
    if not (folder / "saved.json").exists():
        return print(f"{folder.name} has no saved.json yet; tests/adapters.rs says how to write it")
    with tempfile.TemporaryDirectory() as saved:
        shutil.copy(folder / "saved.json", Path(saved) / "adapter_config.json")
        shutil.copy(folder / "adapter_model.safetensors", saved)
        return PeftModel.from_pretrained(base(), saved).eval()


def in_order(folder: Path, settings: dict):
    """Restores the given order of the patterns. PEFT sorts keys on saving, but on loading takes the first pattern that matches, so
    the sorted file could mean another adapter than the trained one."""
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    golden.write_json({**saved, **{key: settings[key] for key in PATTERNS if key in settings}}, path)


@torch.no_grad()
def main() -> None:
    random = torch.Generator().manual_seed(50)
    ids = torch.randint(1, 96, (1, 9), generator=random)
    expected = {"ids": ids, "base": base().eval()(ids).logits}
    for name, settings in KINDS.items():
        model = golden.with_adapter(base(), random, **settings)
        golden.save_adapter(model, HERE / name)
        if name == "first_pattern":
            in_order(HERE / name, settings)
        expected[name] = model(input_ids=ids).logits
        reloaded = PeftModel.from_pretrained(base(), HERE / name).eval()
        assert torch.equal(reloaded(input_ids=ids).logits, expected[name]), name
        if saved := as_undertone_saves(HERE / name):
            golden.same(saved(input_ids=ids).logits, expected[name], f"{name} as undertone saves it")
            print(f"{name}: PEFT loads what undertone saves")
    golden.save(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
