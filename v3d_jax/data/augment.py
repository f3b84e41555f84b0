"""Random variants of training meshes: colours, textures, shape, company.

Each function takes a world-frame `surface.Mesh` of numpy arrays and gives a new one; randomness
comes from the numpy Generator passed in and from nothing else. Held-out objects never come here.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from v3d_jax.data import images, parts, selection
from v3d_jax.mesh import surface

# Channels that differ by less are one grey to the eye.
GREY = selection.SelectionConfig.min_chroma


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Chances in [0, 1] and ranges of `augment`; angles in degrees, lengths in unit radii.

    `hue`, `saturation` and `gain` bound the change of the whole object, `hue_jitter` that of each
    material beside it; saturations and gains are factors in [1 / (1 + x), 1 + x].
    """

    tint: float = 0.8
    recolor: float = 0.6
    hue: float = 180.0
    hue_jitter: float = 20.0
    saturation: float = 0.5
    gain: float = 0.25
    swap: float = 0.2
    paint: float = 0.15
    mirror: float = 0.5
    stretch: float = 0.6
    stretch_by: float = 0.25
    warp: float = 0.3
    twist: float = 40.0
    bend: float = 0.25
    join: float = 0.1
    join_faces: int = 8192


def augment(
    mesh: surface.Mesh,
    rng: np.random.Generator,
    lend: Callable[[np.random.Generator], surface.Mesh] | None = None,
    config: AugmentConfig = AugmentConfig(),
) -> surface.Mesh:
    """A random variant of `mesh`.

    `lend` gives a random training mesh, which lends textures or company; without it, nothing is
    swapped, painted or joined.
    """
    if lend is not None and rng.random() < config.swap:
        mesh = swap_textures(mesh, lend(rng), rng)
    if lend is not None and rng.random() < config.paint:
        mesh = paint(mesh, lend(rng), rng)
    if rng.random() < config.tint:
        mesh = tint(mesh, rng)
    if rng.random() < config.recolor:
        mesh = recolor(mesh, rng, config)
    if rng.random() < config.mirror:
        mesh = mirror(mesh)
    if rng.random() < config.stretch:
        mesh = stretch(mesh, np.exp(rng.uniform(-1, 1, 3) * np.log1p(config.stretch_by)))
    if rng.random() < config.warp:
        mesh = twist(mesh, rng.uniform(-config.twist, config.twist))
        mesh = bend(mesh, rng.uniform(-config.bend, config.bend), rng.uniform(0.0, 360.0))
    if lend is not None and rng.random() < config.join:
        mesh = join(_company(mesh, lend, rng, config.join_faces), rng)
    return mesh


def _company(
    mesh: surface.Mesh,
    lend: Callable[[np.random.Generator], surface.Mesh],
    rng: np.random.Generator,
    faces: int,
) -> list[surface.Mesh]:
    """The mesh and one or two lent ones, as far as they fit into `faces` faces."""
    group = [mesh]
    for _ in range(int(rng.integers(1, 3))):
        other = lend(rng)
        if sum(len(one.faces) for one in [*group, other]) <= faces:
            group.append(other)
    return group


def recolor(
    mesh: surface.Mesh, rng: np.random.Generator, config: AugmentConfig = AugmentConfig()
) -> surface.Mesh:
    """Turns hues, scales saturations and brightness of textures and of untextured base colours."""
    turn = rng.uniform(-config.hue, config.hue)
    saturation = np.exp(rng.uniform(-1, 1) * np.log1p(config.saturation))
    gain = np.exp(rng.uniform(-1, 1) * np.log1p(config.gain))

    def matrices(count: int) -> np.ndarray:
        jitter = rng.uniform(-config.hue_jitter, config.hue_jitter, count)
        return np.stack([color_matrix(turn + x, saturation, gain) for x in jitter])

    base = np.array(mesh.base_color)
    plain = np.flatnonzero(mesh.texture < 0)
    if len(plain):
        changed = np.einsum("mij,mj->mi", matrices(len(plain)), base[plain, :3])
        base[plain, :3] = np.clip(changed, 0.0, 1.0)
    atlas = np.array(mesh.atlas)
    if len(atlas):
        changed = np.einsum("nij,nhwj->nhwi", matrices(len(atlas)), atlas[..., :3] / 255.0)
        atlas[..., :3] = np.rint(255.0 * np.clip(changed, 0.0, 1.0))
    return mesh._replace(base_color=base, atlas=atlas)


def tint(mesh: surface.Mesh, rng: np.random.Generator) -> surface.Mesh:
    """Gives grey untextured materials colours of their lightness, out of a palette of three."""
    base = np.array(mesh.base_color)
    grey = (mesh.texture < 0) & (np.ptp(base[:, :3], axis=1) < GREY)
    palette = 1.0 - rng.uniform(0.1, 0.9, (3, 1)) * rng.random((3, 3))
    palette /= palette.max(axis=1, keepdims=True)
    base[grey, :3] *= palette[rng.integers(3, size=len(base))][grey]
    return mesh._replace(base_color=base)


def color_matrix(turn: float, saturation: float, gain: float) -> np.ndarray:
    """RGB [3,3]: turn about grey in degrees, then factors of chroma and of everything."""
    angle = np.deg2rad(turn)
    axis = np.full((3, 3), 1.0 / 3.0)
    cross = np.asarray([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3.0)
    chroma = np.cos(angle) * (np.eye(3) - axis) + np.sin(angle) * cross
    return gain * (axis + saturation * chroma)


def swap_textures(
    mesh: surface.Mesh, donor: surface.Mesh, rng: np.random.Generator
) -> surface.Mesh:
    """Replaces every opaque texture by a random opaque one of `donor`; holes and glass stay."""
    spare, own = opaque_textures(donor), opaque_textures(mesh)
    if not len(spare) or not len(own):
        return mesh
    atlas, size = np.array(mesh.atlas), mesh.atlas.shape[-2]
    for row in own:
        atlas[row] = images.square(donor.atlas[rng.choice(spare)], size)
    return mesh._replace(atlas=atlas)


def paint(mesh: surface.Mesh, donor: surface.Mesh, rng: np.random.Generator) -> surface.Mesh:
    """Gives one untextured opaque material a random opaque texture of `donor`, box-projected."""
    spare = opaque_textures(donor)
    plain = np.flatnonzero((mesh.texture < 0) & (mesh.base_color[:, 3] == 1.0))
    plain = np.intersect1d(plain, mesh.material)
    if not len(spare) or not len(plain):
        return mesh
    chosen, pixels = rng.choice(plain), donor.atlas[rng.choice(spare)]
    size = max(mesh.atlas.shape[-2] if len(mesh.atlas) else 0, pixels.shape[0])
    mesh = surface.grown(mesh, size)
    texture, base, uv = (np.array(x) for x in (mesh.texture, mesh.base_color, mesh.uv))
    texture[chosen], base[chosen, :3] = len(mesh.atlas), 1.0
    faces = mesh.material == chosen
    uv[faces] = box_uv(mesh.vertices[mesh.faces[faces]]) * rng.uniform(0.5, 2.0)
    atlas = np.concatenate([mesh.atlas, images.square(pixels, size)[None]])
    return mesh._replace(texture=texture, base_color=base, uv=uv, atlas=atlas)


def box_uv(corners: np.ndarray) -> np.ndarray:
    """Texture coordinates [f,3,2] of triangles [f,3,3]: seen along the axis they face most."""
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    axis = np.abs(normal).argmax(axis=-1)
    across = np.asarray([1, 0, 0])[axis]
    up = np.asarray([2, 2, 1])[axis]
    pick = np.stack([across, up], axis=-1)[:, None]
    return np.take_along_axis(corners, pick, axis=-1).astype(np.float32)


def mirror(mesh: surface.Mesh) -> surface.Mesh:
    """Swaps left and right (y); the front stays in front."""
    flip = np.asarray([1.0, -1.0, 1.0], np.float32)
    return mesh._replace(
        vertices=mesh.vertices * flip,
        faces=np.ascontiguousarray(mesh.faces[:, ::-1]),
        normals=np.ascontiguousarray((mesh.normals * flip)[:, ::-1]),
        uv=np.ascontiguousarray(mesh.uv[:, ::-1]),
    )


def deform(
    mesh: surface.Mesh,
    move: Callable[[np.ndarray], np.ndarray],
    jacobian: Callable[[np.ndarray], np.ndarray],
) -> surface.Mesh:
    """Moves points [n,3] by a smooth map, and the normals by its Jacobian [n,3,3].

    Normals follow the Jacobian's cofactors (inverse transpose up to a scale). The result is
    centred and scaled to the unit sphere again.
    """
    corners = mesh.vertices[mesh.faces].reshape(-1, 3).astype(np.float64)
    x, y, z = np.moveaxis(jacobian(corners), 1, 0)
    cofactor = np.stack([np.cross(y, z), np.cross(z, x), np.cross(x, y)], axis=1)
    normals = np.einsum("nij,nj->ni", cofactor, mesh.normals.reshape(-1, 3))
    return mesh._replace(
        vertices=parts.centred(move(mesh.vertices.astype(np.float64))),
        normals=parts.unit(normals).reshape(mesh.normals.shape).astype(np.float32),
    )


def stretch(mesh: surface.Mesh, factors: np.ndarray) -> surface.Mesh:
    """Scales along x, y and z by three positive factors."""
    matrix = np.diag(np.asarray(factors, np.float64))
    return deform(mesh, lambda p: p @ matrix, lambda p: np.broadcast_to(matrix, (len(p), 3, 3)))


def twist(mesh: surface.Mesh, angle: float) -> surface.Mesh:
    """Turns about z by `angle` degrees a unit of height."""
    rate = np.deg2rad(angle)

    def jacobian(points: np.ndarray) -> np.ndarray:
        turn = about_z(rate * points[:, 2])
        # d(R(rate z) p)/dz adds rate times the moved point's tangent to the last column.
        moved = np.einsum("nij,nj->ni", turn, points)
        turn[:, 0, 2] = -rate * moved[:, 1]
        turn[:, 1, 2] = rate * moved[:, 0]
        return turn

    return deform(mesh, lambda p: np.einsum("nij,nj->ni", about_z(rate * p[:, 2]), p), jacobian)


def bend(mesh: surface.Mesh, amount: float, azimuth: float) -> surface.Mesh:
    """Shifts points by `amount` times height squared towards `azimuth` (degrees)."""
    toward = np.asarray([np.cos(np.deg2rad(azimuth)), np.sin(np.deg2rad(azimuth)), 0.0])

    def jacobian(points: np.ndarray) -> np.ndarray:
        matrix = np.tile(np.eye(3), (len(points), 1, 1))
        matrix[:, :, 2] += 2.0 * amount * points[:, 2:] * toward
        return matrix

    return deform(mesh, lambda p: p + amount * p[:, 2:] ** 2 * toward, jacobian)


def join(meshes: Sequence[surface.Mesh], rng: np.random.Generator) -> surface.Mesh:
    """Sets meshes beside each other on one floor, each turned and sized at random, as one mesh."""
    placed = [_placed(mesh, rng) for mesh in meshes]
    heading = rng.uniform(0.0, 2.0 * np.pi)
    direction = np.asarray([np.cos(heading), np.sin(heading), 0.0])
    end, beside = 0.0, []
    for mesh, (vertices, normals) in zip(meshes, placed, strict=True):
        along = vertices @ direction
        moved = vertices + (end - along.min()) * direction
        beside.append(mesh._replace(vertices=moved, normals=normals))
        end += np.ptp(along) + 0.05
    vertices = parts.centred(np.concatenate([mesh.vertices for mesh in beside]))
    return surface.merged(beside)._replace(vertices=vertices)


def _placed(mesh: surface.Mesh, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and normals turned about z by any angle, of random size, standing on z = 0."""
    turn = about_z(rng.uniform(0.0, 2.0 * np.pi, 1))[0]
    vertices = rng.uniform(0.6, 1.0) * (mesh.vertices @ turn.T)
    vertices[:, 2] -= vertices[:, 2].min()
    return vertices, mesh.normals @ turn.T


def about_z(angle: np.ndarray) -> np.ndarray:
    """Rotations [*n,3,3] about z by angles in radians."""
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros_like(angle)
    rows = [[cos, -sin, zero], [sin, cos, zero], [zero, zero, zero + 1.0]]
    return np.moveaxis(np.asarray(rows), -1, 0)


def opaque_textures(mesh: surface.Mesh) -> np.ndarray:
    """Rows of the atlas without any transparency."""
    return np.flatnonzero(mesh.atlas[..., 3].min(axis=(1, 2)) == 255)
