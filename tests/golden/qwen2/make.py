"""Makes this folder's files: a tiny random Qwen2 (tied, biased queries, keys and values) with config.json in transformers 4's
form, a LoRA, and what transformers and PEFT compute with them."""

import json
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import golden  # noqa: E402


def tiny() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
        dtype="float32",
    )
    return Qwen2ForCausalLM(config).float()


def as_transformers_4(path: Path) -> None:
    """The keys that transformers 4 wrote, and Qwen2.5's files on the hub still have."""
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types")
    config["transformers_version"] = "4.43.1"
    config["max_window_layers"], config["sliding_window"] = 2, 512
    golden.write_json(dict(sorted(config.items())), path)


def main() -> None:
    golden.make_case(tiny(), HERE, torch.Generator().manual_seed(20))
    as_transformers_4(HERE / "config.json")


if __name__ == "__main__":
    main()
