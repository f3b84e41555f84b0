"""v3d_jax: one picture in; an orbit video, 3D Gaussians and a textured mesh out, in JAX.

Notebooks start at `v3d_jax.pipeline`; the command line starts at `python -m v3d_jax.sample`.
"""

__version__ = "0.1.0"
