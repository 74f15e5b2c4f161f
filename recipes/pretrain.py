"""Training on next tokens, from nothing or from a model that is there.

    spikelm train pretrain recipes/pretrain.yaml
    accelerate launch -m spikelm.recipes.pretrain recipes/pretrain.yaml

Minimised is the cross entropy of the next token, the mean over all tokens of a step. From nothing, `config` describes
the decoder; from a model folder, training goes on with its weights: what SpikingBrain calls continual pretraining.
Spikes are coded in every forward pass; gradients go straight through the codes, or through surrogates of the neurons.
"""

from pathlib import Path
from typing import Any

from spikelm.recipes.run import command, run
from spikelm.recipes.settings import Settings


def train(config: Path) -> dict[str, Any]:
    """Train on next tokens as CONFIG, a YAML file, says."""
    return run(Settings.read(config))


main = command(train)

if __name__ == "__main__":
    main()
