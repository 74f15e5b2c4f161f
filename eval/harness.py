"""Finding tasks of lm-evaluation-harness by name, and running it without noise, waiting or traces."""

import difflib
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikelm.conversion.sources import quiet
from spikelm.eval.bundled_tasks import BUNDLED, configs

Loaded = dict[str, Any]  # "tasks": name -> task, "groups": name -> group, as `lm_eval.evaluate` takes them

_SEED = 1234  # as in the harness
_SECONDS = 3.0  # within which a hub answers


def check_names(names: Sequence[str], include_path: Sequence[str]) -> None:
    """Raise ValueError unless there is a task of every name, and a folder of every path."""
    if isinstance(names, str) or isinstance(include_path, str):
        raise ValueError(f"tasks and include_path are lists of names and of folders; got {names!r}, {include_path!r}.")
    if not names:
        raise ValueError(f"No task was asked for; choose among {', '.join(BUNDLED)}, or give folders with YAML tasks.")
    for folder in include_path:
        if not Path(folder).is_dir():
            raise ValueError(f"include_path: {folder!r} is not a folder; give one with YAML tasks.")
    local = _manager(include_path, defaults=False).all_tasks
    strange = [name for name in names if name not in local and name not in BUNDLED]
    unknown = [name for name in strange if name not in _builtin()]
    if unknown:
        close = difflib.get_close_matches(unknown[0], [*local, *BUNDLED, *_builtin()], n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        folders = f" In {', '.join(map(str, include_path))}: {', '.join(local) or 'none'}." if include_path else ""
        raise ValueError(
            f"There is no task {unknown[0]!r}.{hint} Without a download: {', '.join(BUNDLED)}.{folders} "
            "lm-evaluation-harness lists its own with `lm_eval ls tasks`."
        )


def load(names: Sequence[str], include_path: Sequence[str], shots: int | None) -> Loaded:
    """Tasks and groups by name, with their documents.

    Args:
        names: of tasks, groups and tags that there are.
        include_path: folders with YAML tasks, whose names come first; then those of `BUNDLED`, then the harness'.
        shots: solved examples before each document; None: as a task says.

    Raises:
        ConnectionError: documents are not on this machine, and the hub that has them cannot be reached.
        ValueError: a task that cannot be loaded.
    """
    manager = _manager(include_path, defaults=False)
    local = manager.task_index
    if any(_needs_builtin(name, local) for name in names):
        manager = _manager(include_path, defaults=True)
    loaded: Loaded = {"tasks": {}, "groups": {}}
    with _without_waiting(all(name in BUNDLED and name not in local for name in names)) as offline:
        for name in names:
            spec = name if name in local or name not in BUNDLED else configs([name])[0]
            try:
                found = manager.load([spec])
            except Exception as error:  # whatever stands in a file that somebody else wrote
                line = " ".join(str(error).split())
                if offline is not None and isinstance(error, OSError):
                    raise ConnectionError(
                        f"The documents of {name!r} are not on this machine ({line}), and {offline}. Without a "
                        f"download: {', '.join(BUNDLED)}, and YAML tasks on local files."
                    ) from error
                raise ValueError(f"The task {name!r} cannot be loaded: {type(error).__name__}: {line}") from error
            loaded["tasks"] |= found["tasks"]
            loaded["groups"] |= found["groups"]
    for task in loaded["tasks"].values():
        stated = task.get_config("num_fewshot")
        if stated is None or (shots is not None and stated != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
    return loaded


def seed(loaded: Loaded) -> None:
    """Begin anew with the solved examples and the random numbers that tasks draw."""
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


@contextmanager
def secluded() -> Iterator[None]:
    """Nothing of the harness, and of what it calls, is seen outside: no bars, log lines and prints, no random numbers.

    Bars made before go on.
    """
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@cache
def _builtin() -> tuple[str, ...]:
    """Names of the harness' own tasks, groups and tags: its thousands of files are read once, in seconds."""
    return tuple(_manager((), defaults=True).all_tasks)


def _needs_builtin(name: str, local: Mapping[str, Any]) -> bool:
    """Whether a name is the harness' own, or that of a local group which names such tasks."""
    if name not in local:
        return name not in BUNDLED
    members = (local[name].cfg or {}).get("task")
    return isinstance(members, list) and any(isinstance(one, str) and one not in local for one in members)


def _manager(include_path: Sequence[str], defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(folder) for folder in include_path], include_defaults=defaults)


@contextmanager
def _without_waiting(local: bool) -> Iterator[str | None]:
    """A hub that does not answer is not asked again and again: within, only what is on this machine is looked for.

    Yields why the hub is not asked; None if it is, or if nothing could be needed from it.
    """
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if any(before):
        reason = "HF_HUB_OFFLINE is set"
    elif local or _answers(constants.ENDPOINT):
        yield None
        return
    else:
        reason = f"{constants.ENDPOINT} cannot be reached"
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(address, timeout=_SECONDS)
    except Exception:  # of whichever library the session is: no route, no name, no time, no certificate
        return False
    return True
