"""Makes what ../qwen2 and ../qwen3 leave open, in models half as wide: qwen2_untied (unembedding of its own, as many keys as queries)
and qwen3_tied (one unembedding, one key and value for all heads)."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import golden  # noqa: E402

import torch  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    "attn_implementation": "eager",
    "dtype": "float32",
}


def main() -> None:
    untied = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=False))
    tied = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=12, tie_word_embeddings=True))
    for seed, (name, model) in enumerate({"qwen2_untied": untied, "qwen3_tied": tied}.items()):
        golden.make_case(model.float(), HERE / name, torch.Generator().manual_seed(40 + seed))


if __name__ == "__main__":
    main()
