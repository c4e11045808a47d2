"""Eight fake CPU devices and quick compiles for every test; ranks never promote; a random key is
used once."""

import gc

import jax
import pytest

from tests.support import quick

quick.set_flags()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# The longest first: a long file at the end leaves the other worker with nothing to do.
LONGEST = (
    "test_step.py",
    "test_train.py",
    "test_models.py",
    "test_convert.py",
    "test_execution.py",
    "test_families.py",
    "test_plan.py",
    "test_lora.py",
    "test_objectives_exact.py",
    "test_digits.py",
)


def pytest_collection_modifyitems(items):
    """Files stay together, as `--dist loadfile` asks for."""
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish():
    """Every library is imported: the garbage collector need not look through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def triple():
    """(policy, reference, target), each [B=3, 2, 4, 4, 1]."""
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, (3, 2, 4, 4, 1)) for k in keys)


@pytest.fixture(scope="module")
def exact_steps():
    """Compiles training steps so that both forwards round alike: margins at step 0 are 0."""
    from dmpo_jax.training import step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "COMPILER_OPTIONS", {**step.COMPILER_OPTIONS, **quick.EXACT})
        yield
