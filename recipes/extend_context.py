"""Longer contexts in stages, 8k -> 32k -> 128k: the same training on next tokens, other windows.

    spikelm train extend_context recipes/extend_context.yaml
    accelerate launch -m spikelm.recipes.extend_context recipes/extend_context.yaml

A stage is the settings above it, changed: longer windows of data, fewer of them in a step, and the fields of the
configuration that depend on length. Where attention rotates positions, a larger `rope_theta` (or another `rope_type`
with its factors) keeps far positions within angles that the model knows; where windows slide, `attention_window` may
grow. Recurrent layers have no limit to raise: they learn to remember longer.

Stages run one after the other, each from the result of the one before: in `out/stage-1`, `out/stage-2`, ..., the last
one in `out` itself. Started again, finished stages are passed by and the interrupted one goes on.
"""

from pathlib import Path
from typing import Any

from spikelm.loading import changed, read_config
from spikelm.recipes.data import DataSettings
from spikelm.recipes.run import command, run, training_arguments
from spikelm.recipes.settings import Settings, read_yaml, strict


def stages(path: Path) -> list[Settings]:
    """The settings of every stage. Raises ValueError, with the file, the stage and the field, for what does not fit."""
    shared = read_yaml(path)
    if not isinstance(shared, dict) or not isinstance(listed := shared.pop("stages", None), list) or not listed:
        raise ValueError(f"{path}: stages must be a list of settings, at least one.")
    if not isinstance(shared.get("out"), str):
        raise ValueError(f"{path}: out must be a folder.")
    settings: list[Settings] = []
    for number, changes in enumerate(listed, 1):
        try:
            if not isinstance(changes, dict):
                raise ValueError(f"a stage must hold named fields; got {changes!r}.")
            if fixed := sorted({"out", "model"} & set(changes)):
                raise ValueError(f"{fixed[0]} is the same for all stages; give it above them.")
            fields = {**shared, **changes}
            for name in ("data", "config", "training"):
                if isinstance(changes.get(name), dict) and isinstance(shared.get(name), dict):
                    fields[name] = {**shared[name], **changes[name]}
            if settings:
                fields |= {"model": f"{settings[-1].out}/model"}
            if number < len(listed):
                fields |= {"out": f"{shared['out']}/stage-{number}"}
            settings.append(strict(Settings, fields))
        except ValueError as error:
            raise ValueError(f"{path}, stage {number}: {error}") from error
    return settings


def train(config: Path) -> dict[str, Any]:
    """Train on longer and longer windows, in the stages of CONFIG, a YAML file."""
    settings = stages(config)
    check(settings)
    return [run(stage) for stage in settings][-1]


def check(settings: list[Settings]) -> None:
    """Raise ValueError or StrictDataclassError for a mistake of a later stage, before the first one takes hours."""
    first = Path(settings[0].model or "")
    model = read_config(first) if first.joinpath("config.json").is_file() else None
    for stage in settings:
        DataSettings.of(stage.data)
        training_arguments(stage)
        if model is not None:
            model = changed(model, stage.config)


main = command(train)

if __name__ == "__main__":
    main()
