"""Eight fake CPU devices for every test; ranks never promote; a random key is used once."""

import gc
import os
import pathlib

# Compiled programs are kept, for the other workers, for the processes that tests start and for the
# next run. The size limit makes JAX lock the folder, without which two workers read half a file.
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dmpo_jax" / "tests"
for _name, _value in {
    "JAX_COMPILATION_CACHE_DIR": str(_CACHE.expanduser()),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 * 2**30),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import pytest  # noqa: E402

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
def quick_steps():
    """Compiles training steps in a third of the time, for what does not ask for quick programs."""
    from dmpo_jax.training import step
    from tests.support.quick import QUICK

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "COMPILER_OPTIONS", {**step.COMPILER_OPTIONS, **QUICK})
        yield
