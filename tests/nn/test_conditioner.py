import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.nn import conditioner


@pytest.mark.golden
def test_vector_of_v3d():
    config = conditioner.ConditionerConfig()
    values = {"motion_bucket_id": 300.0, "fps_id": 1.0, "cond_aug": 0.02}
    vector = conditioner.vector(config, {k: jnp.full((2, 3), v) for k, v in values.items()})
    assert vector.shape == (2, 3, config.vector_dim) == (2, 3, 768)
    index = [0, 1, 127, 128, 129, 255]
    expected = {
        0: [0.54030, 0.59738, 1.0, 0.84147, 0.80196, 1.0746e-4],
        1: [-0.0221, -0.9089, 0.9995, -0.9998, 0.4170, 0.0322],
        2: [0.99980, 0.99983, 1.0, 0.019999, 0.018610, 2.1492e-6],
    }
    for slot, numbers in expected.items():
        part = np.asarray(vector[1, 2, 256 * slot : 256 * (slot + 1)])
        np.testing.assert_allclose(part[index], numbers, atol=6e-5)


def test_one_value_a_frame():
    config = conditioner.ConditionerConfig(scalars=("azimuth",), dim=4)
    azimuth = jnp.asarray([[0.0, 1.0, 2.0]])
    vector = conditioner.vector(config, {"azimuth": azimuth})
    expected = [[np.cos(x), np.cos(x / 100), np.sin(x), np.sin(x / 100)] for x in (0.0, 1.0, 2.0)]
    np.testing.assert_allclose(vector[0], expected, atol=1e-6)


@pytest.mark.parametrize("names", [("fps_id",), ("fps_id", "motion_bucket_id", "cond_aug", "x")])
def test_names_must_be_those_of_the_config(names):
    with pytest.raises(ValueError, match="expected"):
        conditioner.vector(
            conditioner.ConditionerConfig(), {name: jnp.zeros((1, 1)) for name in names}
        )
