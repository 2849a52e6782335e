"""Makes iq4.safetensors: random blocks of IQ4_NL and IQ4_XS, and their f32 values by the gguf package."""

from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent


def main() -> None:
    random = np.random.default_rng(0)
    tensors = {}
    for kind in ("IQ4_NL", "IQ4_XS"):
        dtype = gguf.GGMLQuantizationType[kind]
        n_elements, n_bytes = gguf.GGML_QUANT_SIZES[dtype]
        blocks = random.integers(0, 256, size=(2048 // n_elements, n_bytes), dtype=np.uint8)
        # The first two bytes are the scale; random bits could make it infinite.
        scales = random.normal(scale=0.02, size=len(blocks)).astype(np.float16)
        blocks[:, :2] = scales.view(np.uint8).reshape(-1, 2)
        tensors[f"{kind.lower()}.blocks"] = blocks
        tensors[f"{kind.lower()}.values"] = gguf.quants.dequantize(blocks, dtype).astype(np.float32)
    save_file(tensors, HERE / "iq4.safetensors")


if __name__ == "__main__":
    main()
