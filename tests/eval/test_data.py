import pytest
import torch

from spikelm.eval.data import Text, read_text, read_texts, spread, tokenize


def test_windows_are_disjoint_and_hold_the_tokens_asked_for(tokenizer, letters):
    cut = tokenize(letters, tokenizer, tokens=300, window=64)
    assert [len(w) for w in cut.windows] == [64, 64, 64, 64, 44]
    ids = tokenizer(letters.content, add_special_tokens=False)["input_ids"][:300]
    assert torch.cat(cut.windows).tolist() == ids
    assert (cut.tokens, cut.predicted_tokens) == (300, 295)


def test_bytes_are_those_of_the_predicted_tokens(tokenizer):
    # "é" is one token of two bytes, and the first token of a window is not predicted.
    cut = tokenize(Text("t", "éaéb" + "abcd" * 9, "here"), tokenizer, tokens=8, window=4)
    assert cut.text_bytes == [4, 3]


def test_begin_of_text_stands_before_every_window_of_a_tokenizer_that_adds_it(bos_tokenizer, letters):
    cut = tokenize(letters, bos_tokenizer, tokens=20, window=8)
    bos = bos_tokenizer.bos_token_id
    assert [w[0].item() for w in cut.windows] == [bos] * 3
    ids = bos_tokenizer(letters.content, add_special_tokens=False)["input_ids"]
    assert torch.cat([w[1:] for w in cut.windows]).tolist() == ids[:17]
    assert cut.tokens == 20
    assert cut.text_bytes == [7, 7, 3]  # every character is predicted


def test_a_short_text_says_how_many_tokens_were_found_and_needed(tokenizer):
    with pytest.raises(ValueError, match=r"'tiny' \(here\) is too short: 5 tokens found, 64 needed"):
        tokenize(Text("tiny", "abcde", "here"), tokenizer, tokens=64, window=16)


@pytest.mark.parametrize(("tokens", "window"), [(1, 8), (8, 1), (17, 8)])
def test_windows_that_predict_nothing_are_refused(tokenizer, letters, tokens, window):
    with pytest.raises(ValueError, match="predicts nothing"):
        tokenize(letters, tokenizer, tokens=tokens, window=window)


def test_calibration_windows_spread_over_the_whole_text(tokenizer, letters):
    windows = spread(letters, tokenizer, tokens=64, window=16)
    ids = torch.tensor(tokenizer(letters.content, add_special_tokens=False)["input_ids"])
    starts = [int((ids.unfold(0, 16, 1) == w).all(1).nonzero()[0]) for w in windows]
    assert len(windows) == 4 and starts[0] == 0 and starts[-1] >= 2900
    with pytest.raises(ValueError, match="too short to calibrate on: 3 tokens found, 16 needed"):
        spread(Text("t", "abc", "here"), tokenizer, tokens=64, window=16)


def test_files_are_read_and_named(tmp_path):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "essay.txt", tmp_path / "a" / "essay.md"):
        path.write_text("héllo", encoding="utf-8")
    texts = read_texts([tmp_path / "essay.txt", tmp_path / "a" / "essay.md"])
    assert [t.name for t in texts] == ["essay", "essay-2"]
    assert texts[0].content == "héllo" and texts[0].source == str(tmp_path / "essay.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a\0b", "binary"),
    ],
)
def test_files_that_hold_no_text_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_text(path)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="a folder"):
        read_text(tmp_path)
