"""Settings are strict: every mistake names the file and the field."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from spikelm.recipes import extend_context, pretrain, sft
from spikelm.recipes.data import DataSettings
from spikelm.recipes.extend_context import stages
from spikelm.recipes.run import training_arguments
from spikelm.recipes.settings import Settings, strict

SHIPPED = Path(pretrain.__file__).parent
FIELDS = {
    "model": "somewhere",
    "out": "runs/x",
    "data": {"window": 32, "sources": [{"files": "*.txt"}]},
    "tokens": 1000,
    "batch": 4,
    "micro_batch": 2,
    "checkpoints": 256,
}


@dataclass(frozen=True, kw_only=True)
class Further(Settings):
    """A recipe with fields of its own."""

    temperature: float = 1.0
    weights: dict[str, float]
    steps_of: list[int] | None = None


def read(path, cls=Settings, **changes):
    fields = {name: value for name, value in (FIELDS | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(fields))
    return cls.read(path)


def test_steps_and_accumulation_follow_from_the_budget(tmp_path):
    settings = read(tmp_path / "x.yaml")
    assert (settings.steps, settings.step_tokens, settings.accumulation(1), settings.accumulation(2)) == (7, 128, 2, 1)


def test_a_recipe_adds_fields(tmp_path):
    settings = read(tmp_path / "x.yaml", Further, weights={"kl": 1}, temperature=2)
    assert settings.weights == {"kl": 1} and settings.temperature == 2 and settings.steps_of is None


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(FIELDS) + "training: {learning_rate: 2e-3, adam_epsilon: 1E-8, run_name: 3e}\n")
    training = Settings.read(path).training
    assert training == {"learning_rate": 0.002, "adam_epsilon": 1e-8, "run_name": "3e"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenss": 1}, "unknown field tokenss"),
        ({"batch": None}, "field batch is missing"),
        ({"batch": "four"}, "batch must be int; got 'four'"),
        ({"batch": True}, "batch must be int; got True"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"tokens": 100}, "tokens (100) is less than one step: batch (4) times window (32)"),
        ({"micro_batch": 3}, "batch (4) must be a multiple of micro_batch (3) times processes (1)"),
        ({"model": None}, "give either `model`"),
        ({"tokenizer": "bytes"}, "give either `model`"),
        ({"config": {"hiden_size": 3}}, "config.hiden_size is no field"),
        ({"data": {}}, "data.window must be an int"),
        ({"data": [1]}, "data must be dict"),
        ({"training": {"max_steps": 5}}, "training.max_steps follows from `tokens`"),
        ({"training": {"save_strategy": "no"}}, "training.save_strategy is set by the recipe"),
        ({"training": {"learning_rat": 1e-3}}, "training.learning_rat is no field"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate must be float; got 'fast'"),
        ({"training": {"bf16": 1}}, "training.bf16 must be bool; got 1"),
        ({"weights": {"kl": "much"}}, "weights must be dict[str, float]; got {'kl': 'much'}"),
        ({"steps_of": [1, 2.5]}, "steps_of must be"),
    ],
)
def test_mistakes_name_the_file_and_the_field(tmp_path, changes, said):
    with pytest.raises(ValueError) as error:
        settings = read(tmp_path / "x.yaml", Further, **({"weights": {}} | changes))
        training_arguments(settings)
    assert said in str(error.value)
    assert "x.yaml: " in str(error.value) or "(" in said  # or what follows from several fields


def test_files_that_are_no_settings(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Settings.read(tmp_path / "nowhere.yaml")
    for content, said in (
        ("a: [1", "is not YAML"),
        ("- 1\n", "must hold named fields"),
        ("", "must hold named fields"),
    ):
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(ValueError, match=said):
            Settings.read(tmp_path / "x.yaml")
    with pytest.raises(ValueError, match=r"field data.out is missing"):
        strict(Settings, {}, "data.")


@pytest.mark.parametrize("recipe", [pretrain, sft])
def test_shipped_settings_are_valid(recipe):
    settings = Settings.read(SHIPPED / f"{recipe.__name__.rpartition('.')[2]}.yaml")
    assert settings.steps > 1 and settings.accumulation(1) >= 1 and DataSettings.of(settings.data)


def test_shipped_stages_are_valid():
    short, middle, long = stages(SHIPPED / "extend_context.yaml")
    assert [s.window for s in (short, middle, long)] == [8192, 32768, 131072]
    assert middle.model == f"{short.out}/model" and long.out == "runs/long"
    assert long.training == short.training and middle.data["sources"] == short.data["sources"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": None}, "stages must be a list"),
        ({"stages": []}, "stages must be a list"),
        ({"stages": [3]}, "stage 1: a stage must hold named fields"),
        ({"stages": [{}, {"out": "there"}]}, "stage 2: out is the same for all stages"),
        ({"stages": [{}, {"batches": 2}]}, "stage 2: unknown field batches"),
        ({"out": None, "stages": [{}]}, "out must be a folder"),
    ],
)
def test_mistakes_of_stages_are_named(tmp_path, changes, said):
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (FIELDS | changes).items() if v is not None}))
    with pytest.raises(ValueError, match=f"long.yaml.*{said}"):
        extend_context.stages(path)
