"""Streams: every document once an epoch, exact resuming, the same items for any number of processes."""

import json
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from small_tokenizer import CHARACTERS, letters
from spikelm.recipes import streaming
from spikelm.recipes.data import DataSettings, load_data

WINDOW = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 4)


def stream(folder, seed=0, **fields):
    """Text files, rows, and a hub dataset, mixed."""
    rows = "".join(json.dumps({"text": c * (3 + 5 * i)}) + "\n" for i, c in enumerate("mnopqrs"))
    (folder / "hub").mkdir(exist_ok=True)
    for name in ("rows.jsonl", "hub/rows.jsonl"):
        (folder / name).write_text(rows if name == "rows.jsonl" else rows.upper().replace("TEXT", "text"))
    sources = [{"files": str(folder / "a" / "*.txt"), "weight": 2}]
    sources += [{"files": str(folder / "rows.jsonl"), "weight": 1}, {"hub": str(folder / "hub"), "weight": 0.5}]
    mapping = {"sources": sources, "window": WINDOW, "streaming": True, **fields}
    return load_data(DataSettings.of(mapping), letters(), seed).train


def take(stream, count):
    return list(islice(stream, count))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[name], y[name]) for x, y in zip(a, b) for name in x)


def test_every_document_comes_once_an_epoch(texts):
    settings = {"sources": [{"files": str(texts / "a" / "*.txt")}], "window": WINDOW, "streaming": True}
    train = load_data(DataSettings.of(settings), letters(), 0).train
    files = {f.stem: len(f.read_text()) for f in (texts / "a").glob("*.txt")}
    total = sum(files.values()) + len(files)
    ids = torch.cat([item["input_ids"] for item in take(train, 2 * total // WINDOW + 1)]).tolist()
    first, second = ids[:total], ids[total : 2 * total]
    assert first != second
    for epoch in (first, second):
        counts = Counter(CHARACTERS[i] for i in epoch if i < len(CHARACTERS))
        assert counts == files


def test_order_depends_on_the_seed_alone(texts):
    first = take(stream(texts), 40)
    assert same(first, take(stream(texts), 40))
    assert not same(first, take(stream(texts, seed=1), 40))
    again = stream(texts)
    take(again, 13)
    assert same(first, take(again, 40)), "every iter begins at the start"


def test_sources_have_their_shares(texts):
    ids = [item["input_ids"] for item in take(stream(texts), 140)]
    source = [next(c for i in item if (c := (CHARACTERS + "..")[i]).isalpha()) for item in ids]
    counts = Counter("a" if c in "abcdefghijkl" else "m" if c in "mnopqrs" else "M" for c in source)
    assert all(abs(counts[c] - n) <= 2 for c, n in (("a", 80), ("m", 40), ("M", 20)))


@pytest.mark.parametrize("documents", ["cut", "whole"])
def test_a_restored_stream_goes_on_exactly(texts, documents):
    whole = stream(texts, documents=documents)
    items = take(whole, 100)
    for at in (0, 1, 17, 83):
        state = json.loads(json.dumps(whole.state_dict(at)))
        restored = stream(texts, documents=documents)
        restored.load_state_dict(state)
        assert same(take(restored, 100 - at), items[at:])
        assert restored.state_dict(at) == state
        later = stream(texts, documents=documents)
        later.load_state_dict(restored.state_dict(90))
        assert same(take(later, 10), items[90:])


def test_states_that_do_not_fit_are_refused(texts, monkeypatch):
    monkeypatch.setattr(streaming, "_REMEMBERED", 3)
    train = stream(texts)
    take(train, 5)
    for items in (1, 9):
        with pytest.raises(ValueError, match=f"after {items} items is not known"):
            train.state_dict(items)
    state = train.state_dict(3)
    state["taken"] = [1]
    with pytest.raises(ValueError, match="1 sources, the stream has 3"):
        train.load_state_dict(state)


def test_two_processes_share_the_items_of_one(texts):
    def batches(processes, index):
        loader = DataLoader(stream(texts), batch_size=2)
        options = {"put_on_device": False, "dispatch_batches": False}
        loader = prepare_data_loader(loader, num_processes=processes, process_index=index, **options)
        return take(loader, 12 // processes)

    one, (first, second) = batches(1, 0), (batches(2, 0), batches(2, 1))
    assert same([batch for pair in zip(first, second) for batch in pair], one)


def test_several_workers_would_repeat_items_and_are_refused(texts, monkeypatch):
    monkeypatch.setattr(streaming, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match="one worker"):
        next(iter(stream(texts)))


def test_a_stream_of_nothing_ends_with_an_error(tmp_path, cache):
    (tmp_path / "rows.jsonl").write_text('{"text": " "}\n' * 9)
    settings = {"sources": [{"files": str(tmp_path / "rows.jsonl")}], "window": 8}
    for streamed in (True, False):
        with pytest.raises(ValueError, match=r"rows.jsonl: there is no document"):
            next(iter(load_data(DataSettings.of(settings | {"streaming": streamed}), letters(), 0).train))
