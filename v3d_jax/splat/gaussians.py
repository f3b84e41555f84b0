"""3D Gaussians: the container, view-dependent colour and the PLY file of the reference 3DGS.

Axes: n Gaussian, k coefficient of spherical harmonics (1, 4, 9 or 16 of them: degree 0 to 3).
Parameters are stored as they are optimised, without bounds: scales as logarithms, opacities as
logits. World units; colours are sRGB as displayed.
"""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from v3d_jax.errors import UserError

MAX_DEGREE = 3
SH_C0 = 0.5 / math.sqrt(math.pi)  # the constant harmonic: colour = 0.5 + SH_C0 * sh[:, 0]


class Gaussians(NamedTuple):
    """Anisotropic Gaussians with opacity and colour."""

    means: Float[Array, "n 3"]  # world units
    rotations: Float[Array, "n 4"]  # quaternions (w, x, y, z), of any length but 0
    log_scales: Float[Array, "n 3"]  # natural logarithms of standard deviations
    opacity_logits: Float[Array, "n"]
    sh: Float[Array, "n k 3"]  # real spherical harmonics, for each of red, green, blue

    @property
    def scales(self) -> Float[Array, "n 3"]:
        """Standard deviations along the three axes, in world units."""
        return jnp.exp(self.log_scales)

    @property
    def opacities(self) -> Float[Array, "n"]:
        """Opacity at the mean, in (0, 1)."""
        return jax.nn.sigmoid(self.opacity_logits)


def sh_from_color(color: Float[Array, "n 3"], degree: int = 0) -> Float[Array, "n k 3"]:
    """Coefficients that show `color` from everywhere; those above degree 0 are zero."""
    rest = jnp.zeros((color.shape[0], (degree + 1) ** 2 - 1, 3), color.dtype)
    return jnp.concatenate([((color - 0.5) / SH_C0)[:, None], rest], axis=1)


def sh_degree(num_coefficients: int) -> int:
    """Degree of a set of coefficients; ValueError unless there are 1, 4, 9 or 16."""
    degree = math.isqrt(num_coefficients) - 1
    if (degree + 1) ** 2 != num_coefficients or not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"{num_coefficients} coefficients are not those of degree 0 to 3")
    return degree


def color(
    sh: Float[Array, "n k 3"], means: Float[Array, "n 3"], position: Float[Array, "v 3"]
) -> Float[Array, "v n 3"]:
    """Colour of every Gaussian as seen from every camera position, not below 0.

    As the reference 3DGS: 0.5 + the harmonics of the direction from the camera to the mean.
    """
    if sh_degree(sh.shape[1]) == 0:
        shown = jnp.maximum(0.5 + SH_C0 * sh[:, 0], 0.0)
        return jnp.broadcast_to(shown, (position.shape[0], *shown.shape))
    direction = means[None] - position[:, None]
    length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(direction), -1, keepdims=True), 1e-20))
    basis = sh_basis(direction / length, sh.shape[1])
    total = sum(value[..., None] * sh[None, :, j] for j, value in enumerate(basis))
    return jnp.maximum(0.5 + total, 0.0)


def sh_basis(direction: Float[Array, "*n 3"], count: int) -> list[Float[Array, "*n"]]:
    """The first `count` real spherical harmonics at unit directions, in the order of 3DGS.

    Within a degree m ascends; signs include the Condon-Shortley phase, as in the reference code.
    """
    x, y, z = direction[..., 0], direction[..., 1], direction[..., 2]
    xx, yy, zz = x * x, y * y, z * z
    root = math.sqrt
    basis = [jnp.full_like(x, SH_C0)]
    if count > 1:
        c = root(3 / (4 * math.pi))
        basis += [-c * y, c * z, -c * x]
    if count > 4:
        c = 0.5 * root(15 / math.pi)
        basis += [c * x * y, -c * y * z, 0.25 * root(5 / math.pi) * (2 * zz - xx - yy)]
        basis += [-c * x * z, 0.5 * c * (xx - yy)]
    if count > 9:
        c, d = 0.25 * root(35 / (2 * math.pi)), 0.25 * root(21 / (2 * math.pi))
        e = 0.5 * root(105 / math.pi)
        basis += [-c * y * (3 * xx - yy), e * x * y * z, -d * y * (4 * zz - xx - yy)]
        basis += [0.25 * root(7 / math.pi) * z * (2 * zz - 3 * xx - 3 * yy)]
        basis += [-d * x * (4 * zz - xx - yy), 0.5 * e * z * (xx - yy), -c * x * (xx - 3 * yy)]
    return basis


def ply_fields(degree: int) -> list[str]:
    """Names of a PLY file's properties, in the order of the reference 3DGS."""
    rest = 3 * ((degree + 1) ** 2 - 1)
    return [
        *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"),
        *(f"f_rest_{i}" for i in range(rest)),
        *("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
    ]


def save_ply(path: str | Path, gaussians: Gaussians) -> None:
    """Writes a binary little-endian PLY that viewers of 3DGS files open; float32, normals zero.

    The higher harmonics lie channel by channel: all of red, then green, then blue.
    """
    g = Gaussians(*(np.asarray(field, np.float32) for field in gaussians))
    n = g.means.shape[0]
    rest = g.sh[:, 1:].transpose(0, 2, 1).reshape(n, -1)
    parts = [g.means, np.zeros_like(g.means), g.sh[:, 0], rest]
    parts += [g.opacity_logits[:, None], g.log_scales, g.rotations]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {n}"]
    lines += [f"property float {name}" for name in ply_fields(sh_degree(g.sh.shape[1]))]
    header = "\n".join([*lines, "end_header"]) + "\n"
    Path(path).write_bytes(header.encode() + np.concatenate(parts, 1).astype("<f4").tobytes())


def load_ply(path: str | Path) -> Gaussians:
    """Reads a 3DGS PLY file; unknown properties are skipped.

    Raises UserError for anything else: another format, missing properties, a file cut short.
    """
    values = _read_vertices(Path(path))
    rest = sum(name.startswith("f_rest_") for name in values)
    try:
        degree = sh_degree(rest // 3 + 1 if rest % 3 == 0 else 0)
    except ValueError:
        raise UserError(f"{path}: {rest} f_rest properties; expected 0, 9, 24 or 45") from None
    missing = [name for name in ply_fields(degree) if name[0] != "n" and name not in values]
    if missing:
        raise UserError(f"{path}: no property {missing[0]}: not a 3D Gaussian splat file")

    def columns(*names: str) -> np.ndarray:
        return np.stack([values[name] for name in names], axis=1)

    n = values["x"].shape[0]
    higher = np.zeros((n, 0, 3), np.float32)
    if rest:
        higher = columns(*(f"f_rest_{i}" for i in range(rest))).reshape(n, 3, -1).transpose(0, 2, 1)
    sh = np.concatenate([columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None], higher], axis=1)
    fields = (
        columns("x", "y", "z"),
        columns("rot_0", "rot_1", "rot_2", "rot_3"),
        columns("scale_0", "scale_1", "scale_2"),
        values["opacity"],
        sh,
    )
    return Gaussians(*(jnp.asarray(field) for field in fields))


_PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}


def _read_vertices(path: Path) -> dict[str, np.ndarray]:
    """Scalar vertex properties of a binary little-endian PLY file as float32."""
    data = path.read_bytes()
    head, mark, body = data.partition(b"end_header\n")
    lines = [line.split() for line in head.decode("latin-1").splitlines()]
    if not mark or lines[:1] != [["ply"]]:
        raise UserError(f"{path}: not a PLY file")
    if ["format", "binary_little_endian", "1.0"] not in lines:
        raise UserError(f"{path}: only binary little-endian PLY files are read")
    elements = [i for i, line in enumerate(lines) if line[:1] == ["element"]]
    if not elements or lines[elements[0]][1] != "vertex":
        raise UserError(f"{path}: vertices must come first")
    count = int(lines[elements[0]][2])
    fields = []
    for line in lines[elements[0] : [*elements, len(lines)][1]]:
        if line[:1] == ["property"]:
            if line[1] not in _PLY_TYPES:
                raise UserError(f"{path}: property type {line[1]} of a vertex is not read")
            fields.append((line[2], "<" + _PLY_TYPES[line[1]]))
    layout = np.dtype(fields)
    if len(body) < count * layout.itemsize:
        raise UserError(f"{path}: the file is cut short")
    vertices = np.frombuffer(body, layout, count)
    return {name: vertices[name].astype(np.float32) for name, _ in fields}
