"""Checkpoints that are whole or not there.

    out/checkpoints/step-40.partial    being written; a kill leaves it, the next start removes it
    out/checkpoints/step-40            whole: every file of its manifest is there with its size

All processes write into the `.partial` folder. Then the main one makes the files durable (fsync), writes the manifest
last, and renames the folder, which is one atomic operation. An older checkpoint goes only after that.
"""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

# How a full or broken disk speaks: to Python, to torch's archives, to safetensors.
UNWRITABLE = (OSError, RuntimeError, SafetensorError)
MANIFEST = "manifest.json"
KEPT = 2  # newest ones; the best one beside them


class Checkpoints:
    """The checkpoints of a run, in `folder`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def staging(self, step: int) -> Path:
        """Where the checkpoint of a step is written before it is whole."""
        return self.folder / f"step-{step}.partial"

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step stands once it is whole."""
        return self.folder / f"step-{step}"

    def clean(self) -> None:
        """Remove whatever is not whole."""
        for path in self.folder.glob("step-*"):
            if not is_whole(path):
                shutil.rmtree(path)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, in order."""
        return sorted(int(p.name.removeprefix("step-")) for p in self.folder.glob("step-*") if is_whole(p))

    def commit(self, step: int, best: int | None) -> None:
        """Make a staged checkpoint the newest one; then remove all but the newest and the best."""
        staging = self.staging(step)
        sync_all(staging)
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        manifest = {"step": step, "files": {str(p.relative_to(staging)): p.stat().st_size for p in files}}
        write_whole(staging / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        staging.replace(self.path(step))
        _sync(self.folder)
        steps = self.steps()
        for old in set(steps) - set(steps[-KEPT:]) - {best}:
            (self.path(old) / MANIFEST).unlink()  # half removed, it must not look whole
            shutil.rmtree(self.path(old))


def is_whole(folder: Path) -> bool:
    """Whether a folder holds every file that its manifest lists, each of the listed size."""
    if folder.suffix == ".partial":
        return False
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old content or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def sync_all(folder: Path) -> None:
    """Have the disk hold a folder and all that is in it."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
