"""Puts a trained model into the package, with large kernels as int8.

    python launch/package_model.py runs/mini/model v3d_jax/assets/mini
    python launch/package_model.py runs/scene_mini/model v3d_jax/assets/scene_mini --base ../mini

What the model of `--base` holds already is left out.
Keeps README.md, the model's card, where the target has one. Prints the size of the weights.
"""

import argparse
from pathlib import Path

from flax import nnx

from v3d_jax import errors
from v3d_jax.weights import folder

# What a training run says of the machine that it ran on.
MACHINE = ("run", "data", "latents", "mesh", "multihost", "model")
CARD = "README.md"


def main() -> None:
    """Loads, leaves out what concerns the machine, quantises and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--base", help="a model's folder, as a path from TARGET")
    arguments = parser.parse_args()
    model = folder.load(arguments.model)
    training = model.metadata.get("training", {})
    kept = {name: value for name, value in training.items() if name not in MACHINE}
    card = arguments.target / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    folder.save(
        arguments.target,
        model.generator,
        model.sampling,
        nnx.to_pure_dict(model.params),
        quantize=True,
        metadata={**model.metadata, "training": kept},
        base=arguments.base,
    )
    if text is not None:
        card.write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in arguments.target.glob("*.safetensors"))
    print(f"{arguments.target}: {size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    errors.run(main)
