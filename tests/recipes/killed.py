"""Runs that are killed, each in its own process, with one start of Python: `python -m tests.recipes.killed FOLDER`.

In FOLDER, `whole` is a run that nobody disturbs; `killed` is killed at every place of `PLACES` and started again each
time; `moment` is killed once, at a random moment; `full` runs on a disk that takes no file beyond 20 kB, then on one
that does. Prints a line of JSON: how each process ended, and which checkpoints stood then.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from spikelm.recipes import checkpoints, run
from spikelm.recipes.trainer import RecipeTrainer
from tests.recipes.tiny_run import tiny_data, tiny_settings

# (owner, function, which call of it is not lived through)
PLACES = [
    (RecipeTrainer, "_save_optimizer_and_scheduler", 1),  # weights are there, nothing else
    (RecipeTrainer, "training_step", 11),  # between checkpoints and between two points of the log
    (checkpoints, "write_whole", 1),  # everything but the manifest
    (Path, "replace", 4),  # settings, data, manifest; now the folder would get its name
    (shutil, "rmtree", 2),  # what the last one left is removed; now the oldest checkpoint would be
    (RecipeTrainer, "export", 1),
    (run, "_report", 1),  # the model is there, the report is not
]


def die_at(owner, name, call):
    """Let a call of a function be the end of this process."""
    original, calls = getattr(owner, name), 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, dying)


def in_a_process(out, change=None, seconds=None):
    """Run in a process of its own, killed after so many seconds if any are given; says how it ended."""
    child = os.fork()
    if not child:
        code = 1
        try:
            if change is not None:
                change()
            run.run(tiny_settings(out), data=tiny_data)
            code = 0
        except run.MISTAKES as error:
            print(error, file=sys.stderr)
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), checkpoints.Checkpoints(out / "checkpoints").steps()


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    ends = {"whole": [in_a_process(folder / "whole")]}
    ends["killed"] = [in_a_process(folder / "killed", lambda place=place: die_at(*place)) for place in PLACES]
    ends["killed"] += [in_a_process(folder / "killed")]
    ends["moment"] = [in_a_process(folder / "moment", seconds=random.uniform(0, 3)), in_a_process(folder / "moment")]
    ends["full"] = [in_a_process(folder / "full", small_files), in_a_process(folder / "full")]
    print(json.dumps(ends))
