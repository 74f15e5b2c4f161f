"""A character tokenizer, small models and texts for the evaluation tests."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from small_models import SITES, small_model
from spikelm.eval.data import Text

CHARACTERS = "\n '\"(),-.:;?_=*`<>[]{}" + "".join(map(chr, [*range(48, 58), *range(65, 91), *range(97, 123)]))


def character_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {c: i for i, c in enumerate([*CHARACTERS, "<unk>", "<s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="session")
def make_tokenizer():
    return character_tokenizer


@pytest.fixture
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def bos_tokenizer():
    return character_tokenizer(bos=True)


@pytest.fixture
def letters():
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(CHARACTERS), (4000,), generator=generator).tolist()
    return Text("letters", "".join(CHARACTERS[i] for i in picks), "random characters")


@pytest.fixture
def prose():
    return Text("prose", "A neuron is silent until it has something to say. " * 60, "written for this test")


def pair(dtype=torch.float64, **changes):
    """A spiking model and its baseline with the same weights."""
    model = small_model(dtype, **({"spike_sites": SITES, "spike_dead_zone": 0.3} | changes))
    float_changes = {name: value for name, value in changes.items() if not name.startswith("spike_")}
    baseline = small_model(dtype, **float_changes)
    baseline.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name in baseline.state_dict()}
    )
    return model, baseline


@pytest.fixture(scope="session")
def make_pair():
    return pair
