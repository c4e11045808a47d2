"""The real models at their full size, with random weights: ours equal PyTorch's.

    pytest -m slow tests/models/test_full_size.py -s

One side at a time is in memory; -s shows the seconds and gigabytes of each.
"""

import ctypes
import gc
import json
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import diffusers_io, families
from dmpo_jax.models import parameters
from dmpo_jax.types import Condition
from tests.support import full_size

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
LOADERS = {
    "unet": diffusers_io.load_unet,
    "vae": diffusers_io.load_vae,
    "sd3": diffusers_io.load_model,
    "flux2": diffusers_io.load_model,
    "z_image": diffusers_io.load_model,
    "t5": diffusers_io.load_text_encoder,
    "qwen3": diffusers_io.load_text_encoder,
    "clip": diffusers_io.load_text_encoder,
    "clip_projection": diffusers_io.load_text_encoder,
}
TOLERANCE = 2e-5


def forget() -> None:
    """Lets go of the model before, and counts the peak from here."""
    gc.collect()  # modules are cycles
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free would stay the process's
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def channels_last(array) -> np.ndarray:
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def outputs(kind, model, arrays) -> dict:
    """Returns our model's outputs, named as by `full_size.compute`, from the same inputs."""
    if kind == "unet":
        names = ("sample", "timesteps", "context", "pooled", "time_ids")
        return {"out": model(*(arrays[name] for name in names if name in arrays))}
    if kind == "sd3":
        return {"out": model(*(arrays[name] for name in ("sample", "times", "context", "pooled")))}
    if kind in ("flux2", "z_image"):
        family = families.family_named({"flux2": "klein"}.get(kind, kind))
        condition = Condition(arrays["context"], lengths=arrays.get("lengths"))
        return {"out": family.predict(model, arrays["sample"], arrays["times"], condition)}
    if kind == "vae":
        encoded, decoded = model.encode(arrays["images"]), model.decode(arrays["latents"])
        return {"moments": encoded, "decoded": decoded}
    out = model(arrays["ids"])
    if kind == "t5":
        return {"last": out.last_hidden_state}
    states = {"last": out.last_hidden_state, "penultimate": out.hidden_states[-2]}
    return states if kind == "qwen3" else {**states, "pooled": out.pooled}


@pytest.mark.parametrize("name", full_size.MODELS)
def test_full_size(name, tmp_path):
    kind, _, count, _ = full_size.MODELS[name]
    try:
        program = [sys.executable, full_size.__file__, name, str(tmp_path)]
        child = subprocess.run(program, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        print(child.stderr)
        theirs = json.loads(child.stdout.splitlines()[-1])
        if name == "sdxl_unet":
            assert len(list(tmp_path.glob("*.safetensors"))) > 2
        forget()
        start = time.monotonic()
        model = LOADERS[kind](tmp_path)
        loaded = time.monotonic()
        arrays = {k: channels_last(v) for k, v in np.load(tmp_path / "io.npz").items()}
    finally:
        shutil.rmtree(tmp_path)
    structure, params = parameters.split(model)
    del model
    assert sum(x.size for x in params.values()) == count == theirs["count"]
    given = {k: jnp.asarray(v) for k, v in arrays.items()}

    def run(params, given):
        return outputs(kind, parameters.merge(structure, params), given)

    # Most of the time is LLVM's, on 70 transformer blocks one by one; without its
    # optimisation it is a fraction, and the operations are the same.
    quick = {"xla_backend_optimization_level": 0}
    program = jax.jit(run, compiler_options=quick).lower(params, given).compile()
    compiled = time.monotonic()
    got = jax.block_until_ready(program(params, given))
    ended = time.monotonic()
    errors = {key: relative_error(value, arrays[key]) for key, value in got.items()}
    deviations = {key: round(float(arrays[key].std()), 3) for key in got}
    print(
        f"\n{name}: errors {errors}, deviations {deviations}; load {loaded - start:.1f} s, compile "
        f"{compiled - loaded:.1f} s, run {ended - compiled:.1f} s, peak "
        f"{full_size.peak_gigabytes():.2f} GB; "
        f"PyTorch {theirs['seconds']} s, {theirs['peak_gb']} GB"
    )
    for key, error in errors.items():
        assert 0.01 < deviations[key] < 100, (key, deviations)
        assert error <= TOLERANCE, (key, errors)
