"""Text to train on, and a cache of `datasets` for each test."""

import random

import datasets
import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder where `datasets` keeps what it read, without progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield tmp_path / "cache"
    datasets.enable_progress_bars()


@pytest.fixture
def texts(tmp_path, cache):
    """Twelve text files in `a/`, five in `b/`; a file has one letter only, so that tokens tell where they are from."""
    rng = random.Random(0)
    for folder, letters in (("a", "abcdefghijkl"), ("b", "vwxyz")):
        (tmp_path / folder).mkdir()
        for letter in letters:
            (tmp_path / folder / f"{letter}.txt").write_text(letter * rng.randint(1, 60))
    return tmp_path
