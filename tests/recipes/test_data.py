"""Sources of documents, their windows, their mixture and what is held out."""

import gzip
import json
import pickle
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from small_models import PATTERNS, small_model
from small_tokenizer import CHARACTERS, letters
from spikelm.recipes import documents
from spikelm.recipes.data import DataSettings, load_data
from spikelm.recipes.packing import CutPlan, WholePlan, schedule

EOS = len(CHARACTERS) + 1
WINDOW = 16


def load(folder, *globs, seed=0, weights=None, **fields):
    sources = [{"files": str(folder / pattern)} for pattern in globs or ["a/*.txt"]]
    for source, weight in zip(sources, weights or []):
        source["weight"] = weight
    return load_data(DataSettings.of({"sources": sources, "window": WINDOW, **fields}), letters(), seed)


def pieces(item):
    """The documents of a window, as texts (`.` for the end of a text), split where positions restart."""
    starts = [i for i, p in enumerate(item["position_ids"].tolist()) if p == 0] + [len(item["position_ids"])]
    ids = item["input_ids"].tolist()
    return ["".join("." if i == EOS else CHARACTERS[i] for i in ids[a:b]) for a, b in pairwise(starts)]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in ("input_ids", "labels", "position_ids"))


def sizes(folder):
    return {file.stem: len(file.read_text()) for file in folder.glob("*.txt")}


def test_an_epoch_holds_every_document_once_and_nothing_else(texts):
    train = load(texts).train
    total = sum(sizes(texts / "a").values()) + 12  # an end of text each
    epoch = "".join("".join(pieces(train[i])) for i in range(len(train)))[:total]
    assert len(train) == -(-total // WINDOW)
    assert sorted(epoch.split(".")[:-1]) == sorted(name * size for name, size in sizes(texts / "a").items())


def test_positions_restart_and_labels_leave_out_the_first_token_of_every_document(texts):
    train = load(texts).train
    assert max(len(pieces(train[i])) for i in range(len(train))) > 2
    for i in range(len(train)):
        item = train[i]
        assert {name: (t.shape, t.dtype) for name, t in item.items()} == dict.fromkeys(item, ((WINDOW,), torch.int64))
        expected, begins = [], True
        for token, position in zip(item["input_ids"].tolist(), item["position_ids"].tolist()):
            assert (position == 0) == begins
            expected.append(-100 if begins else token)
            begins = token == EOS
        assert item["labels"].tolist() == expected


@pytest.mark.parametrize("name", ["attention", "gla+swa", "delta", "hgrn", "egru", "rwkv7", "lif"])
@torch.no_grad()
def test_packed_documents_are_what_they_are_alone(texts, name):
    torch.manual_seed(0)
    model = small_model(vocab_size=EOS + 1, **PATTERNS[name])
    train = load(texts).train
    item = max((train[i] for i in range(len(train))), key=lambda item: len(pieces(item)))
    batch = {name: item[name][None] for name in ("input_ids", "position_ids")}
    lengths = [len(piece) for piece in pieces(item)]
    alone = torch.cat([model(ids).logits for ids in batch["input_ids"].split(lengths, 1)], 1)
    assert (model(**batch).logits - alone).abs().max() < 1e-9


def test_order_depends_on_seed_and_index_alone(texts):
    first, again, other = load(texts).train, load(texts).train, load(texts, seed=1).train
    longer = first.sized(3 * len(first))
    assert all(same(first[i], again[i]) and same(first[i], longer[i]) for i in range(len(first)))
    assert not all(same(first[i], other[i]) for i in range(len(first)))
    backwards = [load(texts).train.sized(len(longer))[i] for i in reversed(range(len(longer)))]
    assert all(same(a, longer[i]) for i, a in enumerate(reversed(backwards)))
    sent = pickle.loads(pickle.dumps(first))  # as to a worker of a DataLoader
    assert all(same(sent[i], first[i]) for i in range(len(first)))
    with pytest.raises(IndexError):
        first[len(first)]


def test_every_epoch_has_an_order_of_its_own(texts):
    lengths = np.array([5, 3, 9, 1, 7])
    plan = CutPlan(lengths, 5, [0])  # 25 tokens: five windows an epoch
    orders = [[p.document for i in range(5 * e, 5 * e + 5) for p in plan.pieces(i)] for e in range(4)]
    assert len(set(map(tuple, orders))) == 4
    for order in orders:
        assert set(order) == set(range(5))
    uneven = CutPlan(lengths, 4, [0])
    tokens = Counter((p.document, t) for i in range(25) for p in uneven.pieces(i) for t in range(p.begin, p.end))
    assert set(tokens.values()) == {4}, "100 tokens are four epochs"


def test_a_source_shorter_than_a_window_fills_it_with_epochs():
    assert sum(p.end - p.begin for p in CutPlan(np.array([2, 1]), 10, [0]).pieces(0)) == 10


def test_whole_documents_are_cut_only_if_longer_than_a_window(texts):
    data = load(texts, documents="whole")
    seen = Counter()
    for i in range(len(data.train)):
        item = data.train[i]
        filling = item["labels"].eq(-100) & item["position_ids"].ne(0)
        assert item["input_ids"][filling].eq(EOS).all(), "what is left free carries no loss"
        seen.update(piece for piece in pieces(item) if piece.strip("."))
    wanted = {name: (name * size + ".")[:WINDOW] for name, size in sizes(texts / "a").items()}
    assert seen == Counter(wanted.values())
    plan = WholePlan(np.array([5, 3, 9, 1, 7]), 10, [0])
    assert Counter(p for i in range(3 * plan.windows() - 2) for p in plan.pieces(i))[(2, 0, 9)] >= 2


@pytest.mark.parametrize("weights", [[3, 1], [1, 1], [0.2, 0.5]])
def test_sources_are_mixed_by_weight_after_any_number_of_items(texts, weights):
    train = load(texts, "a/*.txt", "b/*.txt", weights=weights).train.sized(200)
    source = [all(p[0] in "abcdefghijkl." for p in pieces(train[i])) for i in range(200)]
    for n, taken in enumerate(accumulate(source), 1):
        assert abs(taken - n * weights[0] / sum(weights)) <= 1
    assert train.taken() == [sum(source), 200 - sum(source)]


def test_the_schedule_of_many_sources_keeps_every_share():
    weights, phases = [0.1, 1.0, 2.5, 7.0], [0.9, 0.0, 0.5, 0.3]
    source, window = schedule(weights, phases, 1000)
    for k, weight in enumerate(weights):
        own = source == k
        assert (np.abs(own.cumsum() - np.arange(1, 1001) * weight / sum(weights)) < len(weights)).all()
        assert (window[own] == np.arange(own.sum())).all()


def test_describe_counts_tokens_files_and_epochs(texts):
    data = load(texts, "a/*.txt", "b/*.txt", weights=[1, 3], heldout=["a/c.txt"])
    a, b = data.describe()["sources"]
    files = sizes(texts / "a")
    assert (a["files"], a["documents"], a["tokens"]) == (11, 11, sum(files.values()) - files["c"] + 11)
    assert (a["heldout_names"], a["heldout_tokens"]) == ([str(texts / "a" / "c.txt")], files["c"] + 1)
    assert (b["share"], b["windows"]) == (0.75, data.train.taken()[1])
    assert b["epochs"] == round(b["windows"] * WINDOW / b["tokens"], 3) > 1
    assert data.describe()["end_of_text"] == "<eos>"
    json.dumps(data.describe())
    natural = load(texts, "a/*.txt", "b/*.txt").describe()["sources"]
    assert all(source["epochs"] == pytest.approx(1, abs=0.1) for source in natural)


@pytest.mark.parametrize("heldout", [["c.txt", "a/d.*"], 0.25])
def test_whole_files_are_held_out(texts, heldout):
    data = load(texts, heldout=heldout)
    held_out = data.describe()["sources"][0]["heldout_names"]
    names = {Path(file).stem for file in held_out}
    assert names == {"c", "d"} if isinstance(heldout, list) else len(names) == 3
    train = "".join("".join(pieces(data.train[i])) for i in range(len(data.train)))
    assert not names & set(train)
    held = [piece for i in range(len(data.heldout)) for piece in pieces(data.heldout[i])]
    counts = Counter("".join(held))
    del counts["."]
    assert counts == {name: size for name, size in sizes(texts / "a").items() if name in names}
    assert load(texts, heldout=heldout, seed=7).describe()["sources"][0]["heldout_names"] == held_out
    with pytest.raises(IndexError):
        data.heldout[len(data.heldout)]


def test_the_end_of_the_heldout_text_is_filled_up_without_loss(texts):
    item = load(texts, heldout=["c.txt"]).heldout[sizes(texts / "a")["c"] // WINDOW]
    real = (sizes(texts / "a")["c"] + 1) % WINDOW
    assert item["labels"][real:].eq(-100).all() and item["position_ids"][real] == 0
    assert item["labels"][1:real].ne(-100).all() and item["input_ids"][real - 1] == EOS


def test_every_kind_of_file_holds_the_same_documents(texts):
    import datasets

    names = sorted(sizes(texts / "a"))
    contents = [(texts / "a" / f"{name}.txt").read_text() for name in names]
    rows = [{"text": text} for text in contents]
    for folder in ("gz", "hub"):
        (texts / folder).mkdir()
    for name, text in zip(names, contents):
        (texts / "gz" / f"{name}.md.gz").write_bytes(gzip.compress(text.encode()))
    (texts / "hub" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (texts / "rows.jsonl.gz").write_bytes(gzip.compress((texts / "hub" / "rows.jsonl").read_bytes()))
    datasets.Dataset.from_list(rows).to_parquet(texts / "rows.parquet")
    expected = load(texts).train
    hub = {"sources": [{"hub": str(texts / "hub")}], "window": WINDOW}
    others = [load(texts, name).train for name in ("gz/*.md.gz", "rows.jsonl.gz", "rows.parquet")]
    for train in [*others, load_data(DataSettings.of(hub), letters(), 0).train]:
        assert len(train) == len(expected) and all(same(train[i], expected[i]) for i in range(len(train)))


def test_documents_of_a_hub_dataset_are_held_out_by_their_text_or_by_split(texts):
    hub = texts / "hub"
    hub.mkdir()
    for name, letters_ in (("train", "abcdefghij"), ("test", "xyz")):
        (hub / f"{name}.jsonl").write_text("".join(json.dumps({"body": c * 9}) + "\n" for c in letters_ * 2))

    def letters_of(dataset):
        return set("".join("".join(pieces(dataset[i])) for i in range(len(dataset)))) - {"."}

    source = {"hub": str(hub), "field": "body"}
    data = load_data(DataSettings.of({"sources": [source], "window": 8, "heldout": 0.4}), letters(), 0)
    train, held = letters_of(data.train), letters_of(data.heldout)
    assert held and not train & held and train | held == set("abcdefghij")
    by_split = DataSettings.of({"sources": [source | {"heldout_split": "test"}], "window": 8})
    assert letters_of(load_data(by_split, letters(), 0).heldout) == set("xyz")
    for wrong, said in (({"field": "no"}, "no column 'no' among body"), ({"split": "dev"}, "cannot be loaded")):
        with pytest.raises(ValueError, match=said):
            load_data(DataSettings.of({"sources": [source | wrong], "window": 8}), letters(), 0)


def test_text_is_tokenised_once_until_a_file_changes(texts, monkeypatch):
    batches = []
    encode = documents.TextEncoder.__call__
    monkeypatch.setattr(documents.TextEncoder, "__call__", lambda self, b: batches.append(len(b)) or encode(self, b))
    load(texts, heldout=["c.txt"])
    assert sum(batches) == 12
    load(texts, heldout=["c.txt"], seed=5, window=32)
    assert sum(batches) == 12
    (texts / "a" / "d.txt").write_text("d" * 70)
    load(texts, heldout=["c.txt"])
    assert sum(batches) == 23, "the held-out file did not change"


def test_the_end_of_text_is_appended_once_and_may_be_chosen(texts):
    (texts / "a" / "a.txt").write_text("aaa<eos>")
    for end, count in ((None, 12), ("~", 0)):
        data = load(texts, end_of_text=end)
        ids = torch.cat([data.train[i]["input_ids"] for i in range(len(data.train))])
        total = data.describe()["sources"][0]["tokens"]
        assert ids[:total].eq(EOS).sum() == count + (end is not None)
        assert end is None or ids[:total].eq(CHARACTERS.index(end)).sum() == 12
    with pytest.raises(ValueError, match="'<end>' is not a token"):
        load(texts, end_of_text="<end>")


BROKEN = {
    "empty.txt": (b" \n", "the file is empty"),
    "latin.txt": ("caf\xe9".encode("latin-1"), "not UTF-8 at byte 3"),
    "cut.txt.gz": (gzip.compress(b"text " * 99)[:-20], "cannot be read"),
    "no.txt.gz": (b"plain", "cannot be read"),
    "wrong.jsonl": (b'{"text": "a"}\n{"text"\n', "line 2: not JSON"),
    "other.jsonl": (b'{"text": "a"}\n{"txt": "b"}\n', "line 2: no field 'text'"),
    "number.jsonl": (b'{"text": 3}\n', "a text was expected, got int"),
    "blank.jsonl": (b"\n", "the file is empty"),
    "list.json": (b'["a"]', "Write one object per line"),
    "no.parquet": (b"PAR1", "cannot be read as parquet"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, cache, name, streaming):
    content, reason = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        next(iter(load(tmp_path, name, streaming=streaming).train))
    assert name in str(error.value) and "\n" not in str(error.value)


def settings(**changes):
    return {"sources": [{"files": ["a"]}], "window": 8} | changes


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"window": 8}, "sources is missing"),
        (settings(sources=[]), "at least one source"),
        (settings(windows=9), "unknown field data.windows"),
        (settings(window=1), "at least 2"),
        (settings(window="8"), "window must be int"),
        (settings(heldout=1), "share below 1"),
        (settings(heldout=[3]), "heldout must be"),
        (settings(documents="some"), "cut or whole"),
        (settings(streaming=1), "streaming must be bool"),
        (settings(sources=[{"files": "a", "hub": "b"}]), "either files or hub"),
        (settings(sources=[{"weight": 1}]), "either files or hub"),
        (settings(sources=[{"files": "a", "split": "test"}]), "belong to hub"),
        (settings(sources=[{"files": "a", "weight": 0}]), "above 0"),
        (settings(sources=[{"files": "a", "weight": 1}, {"files": "b"}]), "every source has a weight"),
        (settings(sources=[{"files": "a"}, {"files": "b"}], streaming=True), "give each a weight"),
        (settings(sources=[{"file": "a"}]), r"unknown field data.sources\[0\].file"),
        (settings(sources=["a"]), r"data.sources\[0\]"),
    ],
)
def test_wrong_settings_are_refused(mapping, said):
    with pytest.raises(ValueError, match=said) as error:
        DataSettings.of(mapping)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("globs", "heldout", "said"),
    [
        (["none/*"], 0.0, "no file fits"),
        (["a/*.txt", "a/a.txt"], 0.0, "is in two sources"),
        (["a/*.txt"], ["q.txt"], "no file fits q.txt"),
        (["a/*.txt"], ["*.txt"], "nothing is left to train on"),
        (["a/a.txt"], 0.5, "nothing is held out"),
    ],
)
def test_sources_that_cannot_be_split_are_refused(texts, globs, heldout, said):
    with pytest.raises(ValueError, match=said):
        load(texts, *globs, heldout=heldout)
