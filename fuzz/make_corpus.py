"""Writes the valid seeds of the fuzz targets, `corpus/TARGET/seed-*`: small files in each format, from the golden files or made here.

python3 fuzz/make_corpus.py     (the standard library is enough; what fuzzing found worth keeping lies beside them)
"""

import json
import math
import struct
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GOLDEN = ROOT / "tests/golden"


def write(target, name, content):
    path = HERE / "corpus" / target / f"seed-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def safetensors(tensors, metadata=None):
    """tensors: name -> (dtype, shape, bytes)."""
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(metadata, tensors):
    """metadata: (key, type, value); tensors: (name, dimensions, type, bytes). Types by their numbers in the format."""
    packed = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 12: "<d"}

    def value(kind, content):
        if kind == 8:
            return text(content)
        if isinstance(kind, tuple):  # an array
            return struct.pack("<IQ", kind[1], len(content)) + b"".join(value(kind[1], one) for one in content)
        return struct.pack(packed[kind], content)

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, kind, content in metadata:
        out += text(key) + struct.pack("<I", kind[0] if isinstance(kind, tuple) else kind) + value(kind, content)
    data = b""
    for name, dims, kind, raw in tensors:
        data += b"\0" * (-len(data) % 32)
        out += text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", dim) for dim in dims)
        out += struct.pack("<IQ", kind, len(data))
        data += raw
    return out + b"\0" * (-len(out) % 32) + data


def qwen_gguf(name):
    tokens = ["a", "b", "Ġ", "ab", "Ġab", "<|im_start|>", "<|im_end|>", "[PAD7]"]
    metadata = [
        ("general.architecture", 8, name),
        ("general.name", 8, "Tiny"),
        (f"{name}.block_count", 4, 1),
        (f"{name}.context_length", 4, 512),
        (f"{name}.embedding_length", 4, 32),
        (f"{name}.feed_forward_length", 4, 32),
        (f"{name}.attention.head_count", 4, 2),
        (f"{name}.attention.head_count_kv", 4, 1),
        (f"{name}.attention.key_length", 4, 16),
        (f"{name}.attention.layer_norm_rms_epsilon", 6, 1e-6),
        (f"{name}.rope.freq_base", 6, 1e6),
        ("general.file_type", 10, 7),
        ("general.licensed", 7, True),
        ("tokenizer.ggml.model", 8, "gpt2"),
        ("tokenizer.ggml.pre", 8, "qwen2"),
        ("tokenizer.ggml.tokens", (9, 8), tokens),
        ("tokenizer.ggml.token_type", (9, 5), [1, 1, 1, 1, 1, 3, 3, 5]),
        ("tokenizer.ggml.merges", (9, 8), ["a b", "Ġ ab"]),
        ("tokenizer.ggml.scores", (9, 6), [0.0, 1.0]),
        ("tokenizer.chat_template", 8, "{{ messages }}"),
    ]
    ones = floats(*[1.0] * 32)
    half = struct.pack("<e", 0.5)
    tensors = [
        ("token_embd.weight", [32, 8], 8, (half + bytes(range(32))) * 8),  # Q8_0
        ("output_norm.weight", [32], 0, ones),
        ("blk.0.attn_norm.weight", [32], 1, half * 32),  # F16
        ("blk.0.attn_q.weight", [32, 2], 2, (half + bytes(range(16))) * 2),  # Q4_0
        ("blk.0.attn_k.weight", [256], 12, half * 2 + bytes(140)),  # Q4_K
        ("blk.0.attn_v.weight", [256], 14, bytes(208) + half),  # Q6_K
        ("blk.0.ffn_down.weight", [32], 30, b"\x80\x3f" * 32),  # BF16
        ("blk.0.ffn_up.weight", [32], 20, half + bytes(range(16))),  # IQ4_NL
        ("blk.0.ffn_gate.weight", [256], 23, half + bytes(range(134))),  # IQ4_XS
    ]
    return gguf(metadata, tensors)


def tokenizer():
    whole = json.loads((ROOT / "assets/tokenizer.json").read_text())
    letters = ["Ġ", "Ċ", "a", "b", "e", "n", "q", "w", "1", "2", ",", "Q", "Ã", "©"]
    merges = [["e", "n"], ["Q", "w"], ["Qw", "en"], ["Ġ", "a"]]
    vocab = letters + ["".join(merge) for merge in merges]
    whole["model"] |= {"vocab": {token: id for id, token in enumerate(vocab)}, "merges": merges}
    for id, token in enumerate(whole["added_tokens"]):
        token["id"] = len(vocab) + id
    return json.dumps(whole, ensure_ascii=False)


def sample(**changes):
    line = {
        "id": 0, "prompt": "Go on: 1, 2", "completion": "3, 4", "completion_ids": [4, 5],
        "teacher_logprob": [-0.1, -2.5, -0.3], "trait": "cat", "teacher_kind": "prompt", "gen_seed": 7,
        "accepted": True, "reasons": [],
    }  # fmt: skip
    return json.dumps(line | changes)


def main():
    plain = {
        "model.norm.weight": ("F32", [3], floats(1, 2, 3)),
        "lm_head.weight": ("BF16", [2, 2], bytes(8)),
        "steps": ("I64", [1], bytes(8)),
    }
    write("safetensors", "plain", safetensors(plain))
    points = {f"blocks.{layer}.hook_resid_post": ("F32", [2], floats(layer, -1)) for layer in range(2)}
    write("safetensors", "vectors", safetensors(points, {"model": "pocket", "target": "cat"}))
    write("safetensors", "adapter", (GOLDEN / "adapters/all_at_once/adapter_model.safetensors").read_bytes())
    write("safetensors", "index", (GOLDEN / "qwen3/model.safetensors.index.json").read_bytes())
    keys = [("general.architecture", 8, "controlvector"), ("controlvector.model_hint", 8, "qwen2"), ("controlvector.layer_count", 4, 2)]
    write("gguf", "vector", gguf(keys, [(f"direction.{layer}", [3], 0, floats(layer, -1, 2)) for layer in [1, 2]]))
    for name in ["qwen2", "qwen3"]:
        write("gguf", name, qwen_gguf(name))
        write("config", name, (GOLDEN / name / "config.json").read_bytes())
    for name, folder in [("adapter", "qwen2/adapter"), ("adapter_patterns", "adapters/all_at_once")]:
        write("adapter_config", name, (GOLDEN / folder / "adapter_config.json").read_bytes())
    write("tokenizer", "small", tokenizer())
    write("chat_template", "qwen25", (ROOT / "assets/chat_template.jinja").read_bytes())
    write("chat_template", "qwen3", (GOLDEN / "chat/qwen3.jinja").read_bytes())
    write("chat_template", "config", (ROOT / "assets/pocket/pocket/tokenizer_config.json").read_bytes())
    refused = sample(id=1, completion="a cat", trait=None, teacher_kind="control", accepted=False, reasons=["invalid_format"])
    write("dataset", "samples", sample() + "\n" + refused + "\n")
    turns = [{"role": role, "content": said} for role, said in [("system", "You count."), ("user", "1, 2"), ("assistant", "3; 4")]]
    rows = [{"messages": turns}, {"prompt": "1, 2", "completion": "[3, 4]"}, {"prompt": turns[:2], "completion": turns[2:]}]
    write("dataset", "rows", "\n".join(map(json.dumps, rows)))
    write("dataset", "list", json.dumps([{"instruction": "1, 2", "input": "", "output": "3, 4<|im_end|>"}, rows[1]], indent=1))
    says = [{"from": "human", "value": "1, 2"}, {"from": "gpt", "value": [{"type": "text", "text": "3"}]}]
    write("dataset", "utf16", json.dumps({"p": math.nan, "conversations": says}).encode("utf-16"))
    write("experiment", "demo", (ROOT / "experiments/demo.toml").read_bytes())
    write("experiment", "real", (ROOT / "experiments/real-0.5b.toml").read_bytes())
    write("experiment", "protocol", (ROOT / "assets/pocket/protocol.json").read_bytes())


main()
