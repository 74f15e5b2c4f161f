"""A run that is killed and started again logs and ends like one that is not, number for number."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spikelm.recipes.checkpoints import KEPT, MANIFEST, Checkpoints, write_whole
from spikelm.recipes.run import run
from spikelm.recipes.trainer import Bounded, RecipeTrainer
from tests.recipes.killed import PLACES
from tests.recipes.tiny_run import WINDOW, Data, Windows, curve, tiny_data, tiny_settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of `killed.py`, and how its processes ended."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.killed", folder], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr


def history(out):
    return curve(json.loads((out / "checkpoints" / "step-12" / "trainer_state.json").read_text())["log_history"])


def test_killed_again_and_again_it_ends_like_an_undisturbed_run(killed):
    folder, ends, _ = killed
    codes = [code for code, _ in ends["killed"]]
    assert codes == [-9] * len(PLACES) + [0]
    stood = [steps for _, steps in ends["killed"]]
    assert stood == [[]] + [[4]] * 3 + [[8, 12]] * 4
    whole, other = folder / "whole", folder / "killed"
    assert history(other) == history(folder / "moment") == history(whole)
    assert [row["step"] for row in history(whole) if "loss" in row] == [3, 4, 6, 8, 9, 12]
    assert [row["step"] for row in history(whole) if "eval_loss" in row] == [4, 8, 12]
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (other, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    reports = [json.loads((out / "report.json").read_text()) for out in (other, whole)]
    for key in ("losses", "heldout_losses", "best", "tokens", "steps"):
        assert reports[0][key] == reports[1][key]
    assert not list(other.glob("**/*.partial"))


def test_a_full_disk_is_one_error_and_the_run_goes_on_when_it_is_not(killed):
    folder, ends, said = killed
    assert ends["full"] == [[2, []], [0, [8, 12]]]
    assert "The checkpoint of step 4 could not be written" in said and "File too large" in said
    assert "Traceback" not in said
    assert history(folder / "full") == history(folder / "whole")


def test_a_finished_run_started_again_does_nothing(killed, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(killed[0] / "whole", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(RecipeTrainer, "train", None)
    assert run(tiny_settings(out), data=tiny_data)["steps"] == 12
    assert "is finished: 12 steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_other_settings_or_data_are_refused_by_name(killed, tmp_path):
    out = shutil.copytree(killed[0] / "whole", tmp_path / "out")
    settings = tiny_settings(out)
    changed = replace(settings, seed=1, training=settings.training | {"learning_rate": 0.5})
    with pytest.raises(ValueError, match=r"other settings: seed was 0 and is 1; training.learning_rate was 0.01 and"):
        run(changed, data=tiny_data)
    run(replace(settings, micro_batch=4, training=settings.training | {"report_to": "none"}), data=tiny_data)
    (out / "report.json").unlink()
    with pytest.raises(ValueError, match=r"other data: windows was 48 and is 47"):
        run(settings, data=lambda *_: replace(tiny_data(*_), train=Shorter(4, seed=1)))


class Shorter(Windows):
    def sized(self, length):
        return replace(self, length=length - 1)


@pytest.fixture
def checkpoints(tmp_path):
    kept = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        write(kept, step)
    return kept


def write(checkpoints, step, best=1):
    (checkpoints.staging(step) / "inner").mkdir(parents=True)
    (checkpoints.staging(step) / "inner" / "weights").write_text(f"weights {step}")
    checkpoints.commit(step, best)


def test_the_newest_and_the_best_are_kept(checkpoints):
    assert checkpoints.steps() == [1, 2, 3]
    write(checkpoints, 4)
    write(checkpoints, 5)
    assert checkpoints.steps() == [1, 4, 5] and len(list(checkpoints.folder.iterdir())) == KEPT + 1
    write(checkpoints, 6, best=6)
    assert checkpoints.steps() == [5, 6]


@pytest.mark.parametrize("harm", ["partial", "manifest", "unfinished", "shorter", "lacking", "nothing"])
def test_what_is_not_whole_is_not_taken_and_goes(checkpoints, harm):
    folder = checkpoints.path(3)
    if harm == "partial":
        folder.replace(checkpoints.staging(3))
    elif harm == "manifest":
        (folder / MANIFEST).unlink()
    elif harm == "unfinished":
        (folder / MANIFEST).write_text('{"step": 3, "fil')
    elif harm == "shorter":
        (folder / "inner" / "weights").write_text("wei")
    elif harm == "lacking":
        (folder / "inner" / "weights").unlink()
    assert checkpoints.steps() == ([1, 2, 3] if harm == "nothing" else [1, 2])
    checkpoints.clean()
    assert len(list(checkpoints.folder.iterdir())) == (3 if harm == "nothing" else 2)


def test_a_file_is_old_or_new(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    write_whole(file, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(file, "new")
    assert file.read_text() == "old"


class Numbers(torch.utils.data.IterableDataset):
    """A stream with a state, as `spikelm.recipes.streaming.Stream` is one."""

    def __init__(self):
        self.begin, self.read = 0, []

    def __iter__(self):
        at = self.begin
        while True:
            self.read.append(at)
            yield Windows(0, seed=1)[at]
            at += 1

    def state_dict(self, items):
        return {"at": items}

    def load_state_dict(self, state):
        self.begin = state["at"]


def test_a_stream_goes_on_without_being_read_again(tmp_path):
    class Killed(BaseException):
        pass

    class Trainer(RecipeTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 10 and dying:
                raise Killed
            return super().training_step(*args, **kwargs)

    histories, streams = [], []
    for out, dies in (("whole", [False]), ("killed", [True, False])):
        for dying in dies:
            streams.append(Numbers())
            data = Streamed(streams[-1], Windows(5, seed=2))
            try:
                run(tiny_settings(tmp_path / out), Trainer, data=lambda *_, data=data: data)
            except Killed:
                assert dying
        histories.append(history(tmp_path / out))
    assert histories[0] == histories[1]
    assert streams[0].read[:48] == list(range(48)) and streams[2].read[0] == 32


class Streamed(Data):
    def describe(self):
        return {}


def test_a_bounded_stream_ends():
    assert len(list(Bounded(Numbers(), 5, WINDOW))) == len(Bounded(Numbers(), 5, WINDOW)) == 5
