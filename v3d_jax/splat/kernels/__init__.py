"""Fused kernels of the rasterizer; each has its plain twin in `v3d_jax.splat`."""
