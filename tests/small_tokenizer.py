"""A tokenizer with one token per character, for tests that need text without a download."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


def letters() -> PreTrainedTokenizerFast:
    """Printable ASCII and a newline, one token each; everything else is `<unk>`."""
    vocabulary = {c: i for i, c in enumerate([*CHARACTERS, "<unk>", "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
