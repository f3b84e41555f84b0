import contextlib
import json
import logging

import numpy as np
import pytest

from v3d_jax.data import loader, orbits, png

CONFIG = loader.LoaderConfig(batch_size=4, num_frames=3, seed=7, threads=2, prefetch=2)


class Numbers:
    """Orbits of numbers: view v of orbit i is 100 i + v."""

    def __init__(self, count: int = 10, views: int = 6):
        self.count, self.views = count, views

    def __len__(self) -> int:
        return self.count

    def clip(self, index, order):
        return {"frames": 100 * index + order, "index": np.int32(index)}

    def name(self, index):
        return f"orbit {index}"


def take(clips, count, config=CONFIG, state=None, **shard):
    """The first batches of a stream, and its state after them."""
    with contextlib.closing(loader.batches(clips, config, **shard)) as stream:
        if state is not None:
            stream.set_state(state)
        found = [next(stream) for _ in range(count)]
        return found, stream.get_state()


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def replace(**changes):
    return loader.dataclasses.replace(CONFIG, **changes)


def test_turns_are_evenly_spaced_and_closed():
    np.testing.assert_array_equal(loader.turn(31, 18, 36), (31 + 2 * np.arange(18)) % 36)
    np.testing.assert_array_equal(loader.turn(5, 1, 36), [5])
    with pytest.raises(ValueError, match="24 equally spaced"):
        loader.turn(0, 24, 36)


def test_a_stream_is_a_function_of_its_seed():
    first, _ = take(Numbers(), 8)
    again, _ = take(Numbers(), 8, replace(threads=0, prefetch=1))
    other, _ = take(Numbers(), 8, replace(seed=8))
    same(first, again)
    assert any((a["frames"] != b["frames"]).any() for a, b in zip(first, other, strict=True))


def test_every_epoch_visits_every_orbit_once_in_a_new_order():
    found, _ = take(Numbers(8), 6)
    epochs = np.concatenate([batch["index"] for batch in found]).reshape(3, 8)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(8), (3, 1)))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()


def test_clips_start_anywhere_and_turn_one_way():
    found, _ = take(Numbers(), 40)
    frames = np.concatenate([b["frames"] for b in found]) % 100
    assert set(frames[:, 0]) == set(range(6))
    np.testing.assert_array_equal(np.diff(frames, axis=1) % 6, 2)


@pytest.mark.parametrize(("chance", "low", "high"), [(0.0, 0, 0), (0.4, 40, 120)])
def test_clips_start_at_the_first_view_unless_drawn_elsewhere(chance, low, high):
    found, _ = take(Numbers(), 60, replace(random_start=chance))
    starts = np.concatenate([b["frames"] for b in found])[:, 0] % 100
    assert low <= np.sum(starts > 0) <= high  # 5 of 6 random starts are elsewhere: 80 expected
    assert (set(starts) == set(range(6))) == (chance > 0)


@pytest.mark.parametrize("chance", [-0.1, 1.5])
def test_a_chance_beyond_one_is_refused(chance):
    with pytest.raises(ValueError, match=rf"a chance in \[0, 1\], not {chance}"):
        replace(random_start=chance)


@pytest.mark.parametrize("world", [2, 4])
def test_hosts_share_the_batch_of_one(world):
    whole, state = take(Numbers(), 5)
    parts = [take(Numbers(), 5, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(whole):
        for rank, (found, part_state) in enumerate(parts):
            assert part_state == state
            size = len(batch["index"]) // world
            for name, value in found[step].items():
                wanted = batch[name][rank * size : (rank + 1) * size]
                np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_restored_stream_goes_on_exactly(stop):
    whole, _ = take(Numbers(), 7)
    _, state = take(Numbers(), stop)
    rest, _ = take(Numbers(), 7 - stop, state=json.loads(json.dumps(state)))
    same(rest, whole[stop:])
    # ... also on another number of hosts
    half, _ = take(Numbers(), 7 - stop, state=state, rank=1, world=2)
    for batch, part in zip(whole[stop:], half, strict=True):
        np.testing.assert_array_equal(part["frames"], batch["frames"][2:])


def test_a_running_stream_can_be_set_back():
    with contextlib.closing(loader.batches(Numbers(), CONFIG)) as stream:
        first = [next(stream) for _ in range(3)]
        stream.set_state({"global_next_index": 4})
        same([next(stream), next(stream)], first[1:])


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="4 cannot be divided among 3 hosts"):
        loader.batches(Numbers(), CONFIG, world=3)
    with pytest.raises(ValueError, match="4 equally spaced frames"):
        loader.batches(Numbers(), replace(num_frames=4))
    with pytest.raises(ValueError, match="no orbits"):
        loader.batches(Numbers(0), CONFIG)


def test_frames_are_pictures_on_white(orbit_folder, noise_orbits):
    clips = loader.FrameClips(orbits.source(orbit_folder))
    found, _ = take(clips, 2)
    for batch in found:
        assert batch["frames"].shape == (4, 3, 16, 16, 3)
        assert batch["frames"].dtype == np.uint8
        for clip, index in zip(batch["frames"], batch["index"], strict=True):
            views = [png.decode_on_white(frame) for frame in noise_orbits[index].frames]
            start = next(v for v, view in enumerate(views) if (view == clip[0]).all())
            np.testing.assert_array_equal(clip, [views[v] for v in loader.turn(start, 3, 6)])


def test_only_the_first_frames_can_be_decoded(orbit_folder):
    source = orbits.source(orbit_folder)
    whole, _ = take(loader.FrameClips(source), 2)
    first, _ = take(loader.FrameClips(source, 2), 2)
    for clips, batch in zip(whole, first, strict=True):
        np.testing.assert_array_equal(batch["frames"], clips["frames"][:, :2])


def test_joined_clips_stand_one_behind_the_other(orbit_folder, noise_orbits):
    parts = [loader.FrameClips(orbits.source(orbit_folder, s)) for s in ("train", "heldout")]
    joined = loader.JoinedClips(parts)
    assert len(joined) == 6
    assert joined.views == 6
    assert [joined.name(i) for i in range(6)] == [o.name for o in [*noise_orbits, noise_orbits[3]]]
    order = np.arange(3)
    for index, (part, place) in enumerate([*((parts[0], i) for i in range(5)), (parts[1], 0)]):
        clip = joined.clip(index, order)
        np.testing.assert_array_equal(clip["frames"], part.clip(place, order)["frames"])
        assert clip["index"] == index
    with pytest.raises(ValueError, match=r"\[3, 6\] views"):
        loader.JoinedClips([parts[0], Numbers(views=3)])


@pytest.mark.slow
def test_worker_processes_change_nothing(orbit_folder, caplog):
    clips = loader.FrameClips(orbits.source(orbit_folder))
    with caplog.at_level(logging.CRITICAL):
        alone, state = take(clips, 5)
        helped, helped_state = take(clips, 5, replace(workers=2))
        rest, _ = take(clips, 2, replace(workers=1), state={"global_next_index": 12})
    same(alone, helped)
    same(alone[3:], rest)
    assert state == helped_state
