"""docs/blocks.md names every block, and of each the states that it has."""

import re
from pathlib import Path

import pytest

from small_models import small_config
from spikelm import SpikeLMConfig, SpikeLMForCausalLM
from spikelm.cache import Stateful
from spikelm.validation import FFNS, MIXERS, NEURONS

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "blocks.md").read_text(encoding="utf-8")
SECTIONS = {"Token mixers": MIXERS, "Channel mixers": FFNS, "What fires at a site": NEURONS}


def rows(title):
    """name -> cells, of all tables under a title."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    text = next(part for part in section if part.startswith(title))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): row for row in cells}


def states(title, name):
    if title == "Token mixers":
        block = SpikeLMForCausalLM(small_config(mixers=name, egru_stack_sizes=[32])).model.layers[1].mixer
    elif title == "Channel mixers":
        block = SpikeLMForCausalLM(small_config(ffns=name)).model.layers[1].ffn
    else:
        changes = {"spike_sites": ["o"], "spike_neuron": name, "spike_code": "ternary"}
        block = SpikeLMForCausalLM(small_config(**changes)).model.layers[1].mixer.o_site
    modules = block.modules() if block is not None else ()
    specs = [module.state_specs() for module in modules if isinstance(module, Stateful)]
    return {state for spec in specs for state in spec}


@pytest.mark.parametrize("title", list(SECTIONS))
def test_page_names_every_block_its_states_and_fields_that_exist(title):
    table = rows(title)
    assert set(table) == set(SECTIONS[title])
    for name, (_, _, stated, fields, _) in table.items():
        assert set(re.findall(r"`(\w+)`", stated)) == states(title, name), name
        for field in re.findall(r"`([a-z]\w+[a-z0-9])`", fields):
            assert field in SpikeLMConfig.__annotations__ or field in MIXERS, (name, field)
