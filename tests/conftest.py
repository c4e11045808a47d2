"""Eight fake CPU devices for every test; ranks never promote; a random key is used once."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def triple():
    """(policy, reference, target), each [B=3, 2, 4, 4, 1]."""
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, (3, 2, 4, 4, 1)) for k in keys)


@pytest.fixture(scope="module")
def quick_steps():
    """Compiles training steps in a third of the time, for what does not ask for quick programs."""
    from dmpo_jax.training import step
    from tests.support import launched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "COMPILER_OPTIONS", {**step.COMPILER_OPTIONS, **launched.QUICK})
        yield
