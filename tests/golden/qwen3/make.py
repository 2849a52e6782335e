"""Makes this folder's files: a tiny random Qwen3 (untied, heads wider than d_model / n_heads, normed queries and keys) in two
shards with config.json in transformers 5's form, a LoRA, and what transformers and PEFT compute with them."""

import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import golden  # noqa: E402


def tiny() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        attn_implementation="eager",
        dtype="float32",
    )
    return Qwen3ForCausalLM(config).float()


def main() -> None:
    golden.make_case(tiny(), HERE, torch.Generator().manual_seed(30), max_shard_size="250KB")


if __name__ == "__main__":
    main()
