"""Runs the interpreted tier of this folder in a process of its own, for Triton's switch holds for a whole process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikelm.kernels.runtime import HAS_TRITON, INTERPRETED

HERE = Path(__file__).parent


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_the_interpreted_tier():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "interpret and not slow",
        "-p",
        "no:cacheprovider",
        str(HERE),
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout[-8000:]}\n{result.stderr[-2000:]}"
