"""Makes qwen2.safetensors and qwen3.safetensors: what TransformerLens sees at its hook points in ../qwen2 and ../qwen3, without adapter.

Needs TransformerLens 3 beside the others (see ../requirements.txt). `HookedTransformer` is its older model, whose weights are
converted by its own functions; `TransformerBridge`, its newer one, adds the points after Qwen3's norms. Left out is what stands
under `q_norm` and `k_norm` (the inside of those norms).
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import golden  # noqa: E402

import torch  # noqa: E402
from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402
from transformer_lens.pretrained.weight_conversions import convert_qwen2_weights, convert_qwen3_weights  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

N_POSITIONS = 6
CONVERT = {"qwen2": convert_qwen2_weights, "qwen3": convert_qwen3_weights}


def hooked(hf) -> HookedTransformer:
    """Its settings for these architectures (loading_from_pretrained.py), nothing folded and nothing centred."""
    c = hf.config
    d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    config = HookedTransformerConfig(
        d_model=c.hidden_size,
        d_head=d_head,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        n_layers=c.num_hidden_layers,
        n_ctx=N_POSITIONS,
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
        use_qk_norm=c.model_type == "qwen3",
        use_attn_result=True,
        device="cpu",
    )
    model = HookedTransformer(config)
    model.load_and_process_state_dict(
        CONVERT[c.model_type](hf, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


@torch.no_grad()
def main() -> None:
    for case in CONVERT:
        hf = AutoModelForCausalLM.from_pretrained(HERE.parent / case, attn_implementation="eager", dtype=torch.float32)
        ids = torch.arange(3, 3 + 7 * N_POSITIONS, 7)[None]
        logits, cache = hooked(hf).run_with_cache(ids)
        found = {"ids": ids, "logits": logits} | {name: x for name, x in cache.items() if "_norm.hook_" not in name}
        bridge = TransformerBridge.boot_transformers(str(HERE.parent / case), hf_model=hf, tokenizer=None)
        _, cache = bridge.run_with_cache(ids)
        found |= {name: x for name, x in cache.items() if name.endswith("_normed")}
        torch.testing.assert_close(logits, hf(ids).logits, rtol=1e-5, atol=1e-5)
        golden.save(found, HERE / f"{case}.safetensors")
        print(f"{case}: {len(found) - 1} points")


if __name__ == "__main__":
    main()
