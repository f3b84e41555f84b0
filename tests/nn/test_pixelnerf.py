"""The scene model: against plain numpy, padding and order of views, memory, and its loss."""

import dataclasses
import functools

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import plain_pixelnerf
import pytest
from flax import nnx

from v3d_jax.nn import pixelnerf, resunet
from v3d_jax.ops import camera
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import sharding

CUBE = pixelnerf.PixelNeRFConfig(
    encoder=resunet.ResUNetConfig(channels=4, blocks=(1, 1)),
    samples=6,
    hidden=8,
    features=5,
    deviation=True,
    position="world",
    rays_at_once=11,
)
DISPARITY = dataclasses.replace(
    CUBE, sampling="disparity", deviation=False, position="none", near=0.5, far=6.0
)
FROM_VIEW = dataclasses.replace(DISPARITY, deviation=True, position="view")
CLIPS, FRAMES, SIZE = 2, 2, (3, 5)
WIDTH, HEIGHT = 48, 32
MOST = 8


def make_cameras(azimuths, radius, wobble, width=WIDTH, height=HEIGHT):
    """Cameras [b, n] around the scene, none of whose numbers another one shares."""
    rng = np.random.default_rng(wobble)
    shape = np.shape(azimuths)
    tilt = rng.uniform(-0.3, 0.5, shape)
    position = radius * np.stack(
        [np.cos(azimuths) * np.cos(tilt), np.sin(azimuths) * np.cos(tilt), np.sin(tilt)], axis=-1
    )
    position = position + rng.uniform(-0.1, 0.1, (*shape, 3))
    up = jnp.asarray([0.0, 0.1, 1.0])
    pose = camera.look_at(jnp.asarray(position, jnp.float32), jnp.asarray([0.1, 0.0, 0.1]), up)
    intrinsics = np.zeros((*shape, 3, 3), np.float32)
    intrinsics[..., 0, 0] = rng.uniform(0.7, 0.9, shape) * width
    intrinsics[..., 1, 1] = rng.uniform(1.0, 1.2, shape) * height
    intrinsics[..., 0, 1] = rng.uniform(-2.0, 2.0, shape)
    intrinsics[..., 0, 2] = rng.uniform(0.4, 0.6, shape) * width
    intrinsics[..., 1, 2] = rng.uniform(0.4, 0.6, shape) * height
    intrinsics[..., 2, 2] = 1.0
    size = jnp.ones(shape, jnp.int32)
    return camera.Camera(pose, jnp.asarray(intrinsics), size * width, size * height)


def make_targets(frames=FRAMES, clips=CLIPS):
    azimuths = 0.4 + 0.5 * np.arange(frames)[None] + 0.2 * np.arange(clips)[:, None]
    return make_cameras(azimuths, 2.2, 1)


def make_source(views=MOST, valid=MOST, channels=4, clips=CLIPS):
    """Feature maps of other proportions than the pictures.

    Those that are not valid are NaN, under cameras that see as much as the others.
    """
    azimuths = 0.7 * np.arange(views)[None] + 0.1 * np.arange(clips)[:, None]
    cameras = make_cameras(azimuths, 1.9, 2)
    maps = jnp.asarray(4.0 * fixtures.draw(3, (clips, views, 7, 9, channels)))
    mask = jnp.broadcast_to(jnp.arange(views) < valid, (clips, views))
    maps = jnp.where(mask[..., None, None, None], maps, jnp.nan)
    return pixelnerf.Source(maps, cameras, mask)


@functools.cache
def model(config, dtype=jnp.float32):
    """A network with weights that make samples differ, and its renderer, compiled."""
    create = lambda: pixelnerf.PixelNeRF(config, dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
    graphdef, params = nnx.split(fixtures.randomise(create))

    @functools.partial(fixtures.jit, static_argnums=3)
    def render(params, source, targets, size, key=None):
        return nnx.merge(graphdef, params).render(source, targets, size, key)

    return graphdef, params, render


def plain_views(source, clip):
    """The valid views of a clip, for the plain renderer."""
    maps, cameras, valid = source
    pick = lambda x: np.asarray(x[clip], np.float64)[np.asarray(valid[clip])]  # noqa: E731
    return list(zip(pick(maps), *(pick(x) for x in cameras), strict=True))


def plain_params(params):
    """Those of the renderer, in float64."""
    pure = nnx.to_pure_dict(params["renderer"])
    return jax.tree.map(lambda x: np.asarray(x, np.float64), pure)


def plain_render(config, params, source, targets, size):
    """Every frame by the plain renderer; returns features, colours, disparities and counts."""
    found = []
    for clip in range(targets.width.shape[0]):
        for frame in range(targets.width.shape[1]):
            target = [np.asarray(x[clip, frame], np.float64) for x in targets]
            views = plain_views(source, clip)
            found.append(plain_pixelnerf.render(config, params, views, target, size))
    shape = (*targets.width.shape, *size, -1)
    return [np.stack(x).reshape(shape) for x in zip(*found, strict=True)]


def test_full_size_has_the_published_parameters():
    def count(**options):
        config = pixelnerf.PixelNeRFConfig(**options)
        net = nnx.eval_shape(lambda: pixelnerf.PixelNeRF(config, rngs=nnx.Rngs(0)))
        total = {
            name: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(part)))
            for name, part in (("encoder", net.encoder), ("renderer", net.renderer))
        }
        return config.inputs, total["encoder"], total["renderer"]

    assert count() == (64, 8_917_120, 91_396)
    assert count(deviation=True, position="world") == (167, 8_917_120, 91_396 + 103 * 128)


@pytest.mark.parametrize(
    "config", [CUBE, DISPARITY, FROM_VIEW], ids=["cube", "disparity", "from view"]
)
def test_equals_the_plain_renderer(config):
    _, params, render = model(config)
    source, targets = make_source(valid=5), make_targets()
    found = render(params, source, targets, SIZE)
    assert found.features.shape == (CLIPS, FRAMES, *SIZE, 5)
    features, rgb, near, counts = plain_render(config, plain_params(params), source, targets, SIZE)
    # All cases occur: samples that no view sees, one, and several.
    assert {0, 1, 2, 3} <= set(counts.ravel().tolist())
    np.testing.assert_allclose(found.features, features, atol=2e-4)
    np.testing.assert_allclose(found.rgb, rgb, atol=2e-4)
    np.testing.assert_allclose(found.disparity.frames, near[..., 0], atol=2e-4)
    assert features.std(axis=(0, 1, 2, 3)).min() > 0.02


@pytest.mark.parametrize("views", range(1, MOST + 1))
def test_any_number_of_views_is_padded_into_one_program(views):
    """Padding is NaN; each number is the plain renderer's on that many views."""
    _, params, render = model(CUBE)
    source, targets = make_source(valid=views), make_targets()
    found = render(params, source, targets, SIZE)
    first = jax.tree.map(lambda x: x[:1, :1], targets)
    features, rgb, *_ = plain_render(CUBE, plain_params(params), source, first, SIZE)
    np.testing.assert_allclose(found.features[:1, :1], features, atol=2e-4)
    np.testing.assert_allclose(found.rgb[:1, :1], rgb, atol=2e-4)


def test_padding_gives_what_the_views_give_without_it():
    _, params, render = model(CUBE)
    source, targets = make_source(valid=3), make_targets()
    cut = jax.tree.map(lambda x: x[:, :3], source)
    found = [render(params, x, targets, SIZE) for x in (source, cut)]
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_order_of_views_changes_nothing():
    _, params, render = model(CUBE)
    source, targets = make_source(valid=5), make_targets()
    order = np.random.default_rng(0).permutation(MOST)
    shuffled = jax.tree.map(lambda x: x[:, order], source)
    want = render(params, source, targets, SIZE)
    found = render(params, shuffled, targets, SIZE)
    for x, y in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    # It is the order of views with their cameras: another assignment is another scene.
    order = np.asarray([1, 2, 3, 4, 0, 5, 6, 7])
    mixed = source._replace(maps=source.maps[:, order])
    assert np.abs(render(params, mixed, targets, SIZE).features - want.features).max() > 0.01


def test_seen_from_the_first_view_the_world_may_be_turned():
    """Positions of the first view are the same wherever the world's axes are; those there not."""
    turn = np.eye(4)
    turn[:3, :3] = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    turn[:3, :3] *= np.linalg.det(turn[:3, :3])
    turn[:3, 3] = [0.3, -0.2, 0.5]

    def moved(cameras):
        return cameras._replace(world_to_camera=cameras.world_to_camera @ turn.astype(np.float32))

    source, targets = make_source(valid=3), make_targets()
    there = source._replace(cameras=moved(source.cameras)), moved(targets)
    for position in ("view", "world"):
        _, params, render = model(dataclasses.replace(FROM_VIEW, position=position))
        off = np.abs(
            render(params, *there, SIZE).features - render(params, source, targets, SIZE)[0]
        )
        assert off.max() < 2e-3 if position == "view" else off.max() > 0.05


def test_the_pictures_own_colours_and_latents_end_the_features():
    """Of pictures and latents that are linear across and down, whose means are known."""

    def ramps(height, width):
        y, x = np.mgrid[:height, :width] + 0.5
        return np.stack([x / width, y / height, 0.5 * (x / width + y / height)], axis=-1)

    def of_views(height, width):
        shape = (*views.valid.shape, height, width, 3)
        return jnp.broadcast_to(jnp.asarray(ramps(height, width), jnp.float32), shape)

    views = make_views()
    views = views._replace(images=of_views(HEIGHT, WIDTH))
    config = dataclasses.replace(CUBE, encoder=resunet.ResUNetConfig(channels=7, blocks=(1, 1)))
    params = model(config)[1]

    def maps(views, *carried):
        graphdef = model(dataclasses.replace(config, carried=carried))[0]
        return fixtures.jit(lambda p, x: nnx.merge(graphdef, p).encode(x).maps)(params, views)

    with pytest.raises(ValueError, match="give views with theirs"):
        maps(views, "latents")
    # Latents of half the resolution of the maps, and upside down.
    h, w = maps(views).shape[2:4]
    views = views._replace(latents=of_views(h // 2, w // 2)[:, :, ::-1])
    found = maps(views, "colors", "latents")
    np.testing.assert_allclose(found[..., :1], maps(views)[..., :1], atol=1e-4)
    wanted = np.concatenate([ramps(h, w), ramps(h, w)[::-1]], axis=-1)
    for picture in found[0]:
        np.testing.assert_allclose(picture[1:-1, 1:-1, 1:], wanted[1:-1, 1:-1], atol=1e-5)
    with pytest.raises(ValueError, match="7 features leave no room"):
        maps(views, "colors", "latents", "colors")


def make_views(padding=0.0, *, broken=False):
    """Two views of two clips, the second clip's second one being padding.

    Its image is filled with `padding`; its camera sees the scene, or is `broken`.
    """
    cameras = make_source(views=2).cameras
    valid = jnp.asarray([[True, True], [True, False]])
    images = jnp.asarray(fixtures.draw(4, (CLIPS, 2, HEIGHT, WIDTH, 3)))
    images = jnp.where(valid[..., None, None, None], images, padding)
    if broken:
        pose = jnp.where(valid[..., None, None], cameras.world_to_camera, jnp.nan)
        cameras = cameras._replace(world_to_camera=pose)
    return pixelnerf.Views(images, cameras, valid)


@pytest.mark.parametrize("blend", [0, 4])
def test_a_padded_view_changes_nothing_of_any_clip_to_the_bit(blend):
    """From images on, through the statistics of the feature network too."""
    graphdef, params, _ = model(dataclasses.replace(CUBE, blend=blend))
    run = fixtures.jit(lambda p, *a: nnx.merge(graphdef, p)(*a, SIZE))
    views = (make_views(), make_views(7.0), make_views(jnp.nan), make_views(jnp.nan, broken=True))
    plain, *others = (run(params, x, make_targets()) for x in views)
    for other in others:
        for x, y in zip(*map(jax.tree.leaves, (plain, other)), strict=True):
            assert np.isfinite(x).all()
            np.testing.assert_array_equal(x, y)
    visible = make_views()._replace(valid=jnp.ones((CLIPS, 2), bool))
    # Of the first clip, whose views are the same: statistics are those of the batch.
    difference = run(params, visible, make_targets()).features - plain.features
    assert np.abs(difference[0]).max() > 1e-3


def test_parts_of_any_size_give_the_same():
    """60 rays a clip: in parts of 11, which do not divide them, and in one part."""
    _, params, _ = model(CUBE)
    source, targets = make_source(valid=3), make_targets()
    found = [
        model(dataclasses.replace(CUBE, rays_at_once=size))[2](params, source, targets, SIZE)
        for size in (11, 1000)
    ]
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_samples_move_only_by_a_key_and_of_every_ray_by_itself():
    config = dataclasses.replace(CUBE, samples=2, rays_at_once=4)
    _, params, render = model(config)
    source = make_source(valid=3)
    # Twice the same frame.
    targets = jax.tree.map(lambda x: jnp.repeat(x[:, :1], 2, axis=1), make_targets())
    still, first, again, other = (
        render(params, source, targets, SIZE, key).features
        for key in (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))
    )
    np.testing.assert_allclose(still[:, 0], still[:, 1], atol=1e-6)
    np.testing.assert_array_equal(first, again)
    for x, y in ((still, first), (first, other), (first[:, 0], first[:, 1])):
        changed = np.abs(x - y).max(axis=-1)
        assert np.mean(changed > 1e-4) > 0.9


def test_gradients_are_finite_differences_of_the_plain_renderer():
    """Along random directions in the weights and in the feature maps."""
    config = CUBE
    graphdef, params, _ = model(config)
    source = make_source(views=4, valid=3)
    source = source._replace(maps=jnp.nan_to_num(source.maps))
    targets = make_targets(frames=1)
    shapes = ((5,), (3,), ())
    weight = [fixtures.draw(8 + i, (CLIPS, 1, *SIZE, *tail)) for i, tail in enumerate(shapes)]

    def loss(params, maps):
        out = nnx.merge(graphdef, params).render(source._replace(maps=maps), targets, SIZE)
        shown = (out.features, out.rgb, out.disparity.frames)
        return sum(jnp.sum(w * x) for w, x in zip(weight, shown, strict=True))

    grads = fixtures.jit(jax.grad(loss, (0, 1)))(params, source.maps)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert not np.any(grads[1][:, 3])

    def plain(params, maps):
        moved = source._replace(maps=maps)
        features, rgb, near, _ = plain_render(config, params, moved, targets, SIZE)
        shown = np.sum(weight[0] * features) + np.sum(weight[1] * rgb)
        return shown + np.sum(weight[2] * near[..., 0])

    start = (plain_params(params), np.asarray(source.maps, np.float64))
    rng = np.random.default_rng(0)
    for part, slope in enumerate((plain_params(grads[0]), grads[1])):
        along = jax.tree.map(lambda x: rng.standard_normal(x.shape), start[part])
        ends = []
        for side in (1e-6, -1e-6):
            moved = list(start)
            moved[part] = jax.tree.map(lambda x, d, side=side: x + side * d, start[part], along)
            ends.append(plain(*moved))
        want = (ends[0] - ends[1]) / 2e-6
        pairs = zip(jax.tree.leaves(slope), jax.tree.leaves(along), strict=True)
        got = sum(np.vdot(np.asarray(g, np.float64), d) for g, d in pairs)
        size = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(slope)))
        np.testing.assert_allclose(got, want, atol=1e-3 * size)


def gradient_memory(frames, rays_at_once):
    """Bytes of temporaries of a gradient by weights and feature maps."""
    config = dataclasses.replace(
        CUBE,
        encoder=resunet.ResUNetConfig(channels=16, blocks=(1, 1)),
        samples=64,
        hidden=32,
        features=32,
        position="none",
        rays_at_once=rays_at_once,
    )
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: pixelnerf.PixelNeRF(config, rngs=nnx.Rngs(0)))
    )
    source, targets = make_source(views=3, channels=16, clips=1), make_targets(frames, clips=1)

    def loss(params, source, targets):
        out = nnx.merge(graphdef, params).render(source, targets, (16, 16))
        return jnp.mean(jnp.square(out.features)) + jnp.mean(jnp.square(out.rgb))

    gradient = jax.grad(loss, allow_int=True)
    compiled = jax.jit(gradient).lower(params, source, targets).compile(fixtures.FAST_COMPILE)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_does_not_follow_the_number_of_frames():
    """Beyond a frame's own rays and results, far below one array of what its samples know."""
    few, many = (gradient_memory(frames, 64) for frames in (2, 18))
    at_once = gradient_memory(2, 10**6)
    one_array = 16 * 16 * 64 * 16 * 4
    assert (many - few) / 16 < 0.25 * one_array
    # The measure shows samples where there are any: those of a quarter of a frame, and of two.
    assert at_once > few + 10 * one_array


def test_devices_that_share_clips_and_frames_divide_the_work():
    """Rays that are computed at once are split as frames are, 11 of them over two devices."""
    graphdef, params, _ = model(CUBE)
    mesh = meshes.make(meshes.MeshConfig(devices=4, frames=2))
    args = (params, make_source(views=2), make_targets())

    def run(params, source, targets):
        return nnx.merge(graphdef, params).render(source, targets, SIZE)

    whole, batch = sharding.replicated(mesh), sharding.batch(mesh)
    split = fixtures.jit(sharding.on_mesh(run, mesh), in_shardings=(whole, batch, batch))
    split, alone = (f.lower(*args).compile() for f in (split, fixtures.jit(run)))
    found = (split(*args), alone(*args))
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)
        assert x.sharding.spec[1] == "frames"
    work = [program.cost_analysis()["flops"] for program in (split, alone)]
    assert work[0] < 0.3 * work[1]


def test_bfloat16_activations_give_float32_colours():
    _, params, render = model(CUBE)
    source, targets = make_source(valid=3), make_targets()
    want = render(params, source, targets, SIZE)
    half = model(CUBE, jnp.bfloat16)[2](params, source, targets, SIZE)
    assert (half.features.dtype, half.rgb.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(half.rgb, want.rgb, atol=0.02)
    np.testing.assert_allclose(half.features.astype(jnp.float32), want.features, atol=0.1)


def test_the_loss_is_the_squared_error_of_smaller_frames_of_every_clip():
    loss = fixtures.jit(pixelnerf.rgb_loss)
    rgb = np.random.default_rng(0).uniform(size=(2, 3, 4, 6, 3)).astype(np.float32)
    frames = np.full((2, 3, 32, 48, 3), 0.25, np.float32)
    want = np.mean(np.square(rgb - 0.25), axis=(1, 2, 3, 4))
    np.testing.assert_allclose(loss(jnp.asarray(rgb), jnp.asarray(frames)), want, rtol=1e-5)
    # Averaged before they are compared: finer detail than a pixel costs nothing.
    board = np.indices((32, 48)).sum(axis=0)[..., None] % 2
    board = jnp.asarray(np.broadcast_to(board, frames.shape), jnp.float32)
    assert np.all(loss(jnp.full(rgb.shape, 0.5), board) < 1e-4)
