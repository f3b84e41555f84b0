"""Networks (flax.nnx), channels-last; built from frozen dataclasses."""
