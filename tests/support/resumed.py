"""A run in two parts against one in a single part."""

import numpy as np

from dmpo_jax import diffusers_io
from dmpo_jax.jobs.run import run


def assert_same(make_config, folder) -> None:
    """Bit for bit, exported. make_config: takes the leaves of a config of four steps or two."""
    exports = []
    for name, counts in (("whole", (4,)), ("parts", (2, 4))):
        for steps in counts:
            leaves = {"train__steps": steps, "log__validate_every": 0, "log__checkpoint_every": 2}
            run(make_config(**leaves), folder / name)
        model = diffusers_io.load_model(folder / name / "export")
        exports.append(diffusers_io.state_dict(model))
    whole, parts = exports
    assert set(whole) == set(parts)
    for path, array in whole.items():
        np.testing.assert_array_equal(parts[path], array, err_msg=path)
