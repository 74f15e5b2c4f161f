"""Optional C++ for loops over time that torch cannot run at once: plain functions, compiled when first needed.

`library("egru")` compiles `egru.cpp` beside this file with the C++ compiler of the machine (`CXX`, else `g++`), which
takes seconds, and keeps the result in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`). Nothing depends on
it: without a compiler, or with SPIKELM_CPP=0, it is None, and the caller takes its torch path. The files need neither
Python's nor torch's headers: they get pointers to contiguous memory, and bring their own threads.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

from torch import Tensor

# No -ffast-math: comparisons that decide an event, NaN and infinity keep their meaning.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")


@cache
def library(name: str, *flags: str) -> ctypes.CDLL | None:
    """The compiled `kernels/<name>.cpp`, or None where it cannot be had; a compiler that fails is warned about.

    `flags` are the compiler's, beside those that all files get.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or os.environ.get("SPIKELM_CPP", "1") == "0":
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        texts = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
        key = hashlib.sha256("\0".join([*texts, compiler, *FLAGS, *flags, _processor()]).encode()).hexdigest()[:16]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spikelm"
        target = folder / f"{name}-{key}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / "built.so"
                command = [compiler, *FLAGS, *flags, str(source), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                built.replace(target)  # at once, so that no other process loads half a file
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: a user without a home
        reason = getattr(error, "stderr", None) or error
        warnings.warn(f"{source.name} could not be compiled; torch is used, which is slower: {reason}", stacklevel=2)
        return None


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Where a contiguous tensor begins; null for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _processor() -> str:
    """What -march=native depends on, so that machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "".join(next((x for x in lines if x.startswith(key)), "") for key in ("model name", "flags", "Features"))
