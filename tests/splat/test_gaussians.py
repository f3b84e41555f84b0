"""Colour by spherical harmonics, and PLY files."""

import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.splat import gaussians as splats


def some(degree, count=7):
    rng = np.random.default_rng(degree)
    shapes = ((count, 3), (count, 4), (count, 3), (count,), (count, (degree + 1) ** 2, 3))
    return splats.Gaussians(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes))


def test_harmonics_are_orthonormal():
    cosine, weight = np.polynomial.legendre.leggauss(16)
    azimuth = 2 * np.pi * np.arange(32) / 32
    sine = np.sqrt(1 - cosine**2)
    x, y = np.outer(sine, np.cos(azimuth)), np.outer(sine, np.sin(azimuth))
    z = np.repeat(cosine[:, None], 32, axis=1)
    area = np.repeat(weight[:, None], 32, axis=1) * 2 * np.pi / 32
    basis = np.stack(splats.sh_basis(jnp.asarray(np.stack([x, y, z], -1), jnp.float32), 16))
    product = np.einsum("ihw,jhw,hw->ij", basis, basis, area)
    np.testing.assert_allclose(product, np.eye(16), atol=1e-5)


def test_harmonics_have_the_signs_and_order_of_3dgs():
    x, y, z = direction = np.asarray([0.48, -0.6, 0.64])
    got = [float(value) for value in splats.sh_basis(jnp.asarray(direction, jnp.float32), 16)]
    expected = [  # the constants of the reference code
        *(0.28209479, -0.48860251 * y, 0.48860251 * z, -0.48860251 * x),
        *(1.09254843 * x * y, -1.09254843 * y * z, 0.31539157 * (3 * z * z - 1)),
        *(-1.09254843 * x * z, 0.54627422 * (x * x - y * y)),
        *(-0.59004359 * y * (3 * x * x - y * y), 2.89061144 * x * y * z),
        *(-0.45704579 * y * (5 * z * z - 1), 0.37317633 * z * (5 * z * z - 3)),
        *(-0.45704579 * x * (5 * z * z - 1), 1.44530572 * z * (x * x - y * y)),
        -0.59004359 * x * (x * x - 3 * y * y),
    ]
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_color_comes_back_and_follows_the_direction():
    wanted = jnp.asarray([[0.2, 0.5, 1.0], [0.0, 0.9, 0.3]])
    means = jnp.asarray([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    eyes = jnp.asarray([[3.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    for degree in range(4):
        sh = splats.sh_from_color(wanted, degree)
        shown = splats.color(sh, means, eyes)
        np.testing.assert_allclose(shown, np.broadcast_to(wanted, (2, 2, 3)), atol=1e-6)
    sh = splats.sh_from_color(wanted, 1).at[:, 3].set(1.0)  # -x: darker where seen along +x
    shown = splats.color(sh, means, eyes)
    assert (np.asarray(shown[0, 0]) > np.asarray(wanted[0])).all()  # seen along -x
    np.testing.assert_allclose(shown[1, 0], wanted[0], atol=1e-6)  # seen along +y
    assert float(splats.color(sh.at[:, 0].set(-9.0), means, eyes).max()) == 0.0
    with pytest.raises(ValueError, match="5 coefficients"):
        splats.color(jnp.zeros((2, 5, 3)), means, eyes)


@pytest.mark.parametrize("degree", range(4))
def test_ply_round_trip_with_the_reference_names(tmp_path, degree):
    path = tmp_path / "splats.ply"
    original = some(degree)
    splats.save_ply(path, original)
    for a, b in zip(original, splats.load_ply(path), strict=True):
        np.testing.assert_array_equal(a, b)
    head = path.read_bytes().split(b"end_header\n")[0].decode().splitlines()
    assert head[:3] == ["ply", "format binary_little_endian 1.0", "element vertex 7"]
    names = [line.split()[-1] for line in head[3:]]
    rest = [f"f_rest_{i}" for i in range(3 * ((degree + 1) ** 2 - 1))]
    assert names == [
        *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"),
        *rest,
        *("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
    ]


def test_ply_reads_back_through_plyfile(tmp_path):
    plyfile = pytest.importorskip("plyfile")
    path = tmp_path / "splats.ply"
    original = some(2)
    splats.save_ply(path, original)
    vertex = plyfile.PlyData.read(str(path))["vertex"]
    np.testing.assert_array_equal(vertex["z"], original.means[:, 2])
    np.testing.assert_array_equal(vertex["opacity"], original.opacity_logits)
    np.testing.assert_array_equal(vertex["scale_1"], original.log_scales[:, 1])
    np.testing.assert_array_equal(vertex["rot_0"], original.rotations[:, 0])
    np.testing.assert_array_equal(vertex["f_dc_2"], original.sh[:, 0, 2])
    # channel by channel: 8 of red, 8 of green, 8 of blue
    np.testing.assert_array_equal(vertex["f_rest_0"], original.sh[:, 1, 0])
    np.testing.assert_array_equal(vertex["f_rest_9"], original.sh[:, 2, 1])
    np.testing.assert_array_equal(vertex["f_rest_23"], original.sh[:, 8, 2])


def test_other_orders_types_and_elements_are_read(tmp_path):
    path = tmp_path / "splats.ply"
    names = [name for name in splats.ply_fields(0) if name[0] != "n"][::-1]
    layout = np.dtype([("label", "u1"), *((name, "<f8") for name in names)])
    values = np.zeros(3, layout)
    for i, name in enumerate(names):
        values[name] = i + np.arange(3) / 4
    kinds = ["property uchar label", *(f"property double {name}" for name in names)]
    lines = ["ply", "format binary_little_endian 1.0", "comment made elsewhere"]
    lines += ["element vertex 3", *kinds, "element face 0"]
    lines += ["property list uchar int vertex_indices", "end_header\n"]
    path.write_bytes("\n".join(lines).encode() + values.tobytes())
    read = splats.load_ply(path)
    np.testing.assert_array_equal(read.means[:, 1], values["y"].astype(np.float32))
    np.testing.assert_array_equal(read.rotations[:, 3], values["rot_3"].astype(np.float32))
    assert read.sh.shape == (3, 1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"obj" + data, "not a PLY file"),
        (lambda data: data.replace(b"binary_little_endian", b"ascii"), "binary little-endian"),
        (lambda data: data[:-1], "cut short"),
        (lambda data: data.replace(b"float opacity", b"float density"), "no property opacity"),
        (lambda data: data.replace(b"float f_rest_8\n", b"float other\n"), "8 f_rest properties"),
        (lambda data: data.replace(b"element vertex", b"element camera"), "come first"),
        (lambda data: data.replace(b"float x", b"half x"), "type half"),
    ],
)
def test_unreadable_files_say_why(tmp_path, change, message):
    path = tmp_path / "splats.ply"
    splats.save_ply(path, some(1))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(errors.UserError, match=message):
        splats.load_ply(path)
