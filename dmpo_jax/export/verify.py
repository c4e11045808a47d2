"""Verifies an export: PyTorch's predictions against ours on the same inputs."""

import dataclasses
import gc
import importlib
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.errors import UserError
from dmpo_jax.export.pipeline import Trained
from dmpo_jax.extras import install_hint
from dmpo_jax.families import Family
from dmpo_jax.models import parameters
from dmpo_jax.models.lora import Adapters
from dmpo_jax.types import Condition

LOG = logging.getLogger(__name__)
LARGEST = 32  # side of the latents: full size takes minutes on a CPU and reveals no more
TOKENS = 77  # of a prompt
BOUND = 1e-3  # relative; float32 gives about 1e-6, float16 weights the same
Inputs = tuple[np.ndarray, np.ndarray, Condition]


def verify(out: epath.Path, trained: Trained) -> float:
    """Returns the relative difference between PyTorch's predictions and ours, and logs it.

    Args:
        out: a pipeline, or adapters for the trained one.

    Raises:
        ValueError: PyTorch or diffusers is missing, or the difference exceeds 1e-3.
    """
    try:
        importlib.import_module("diffusers")
        importlib.import_module("torch")
    except ImportError as error:
        raise UserError(
            f"verifying needs PyTorch diffusers ({error}): {install_hint('eval')}"
        ) from error
    merged = (out / "model_index.json").exists()
    opened = Trained(str(out), None, None) if merged else trained
    _, family = diffusers_io.load_family(opened.folder)
    model = opened.load()
    if opened.adapters:
        model = with_adapters(model, out, opened.adapters, family.component)
    inputs = family.random_inputs(model.config, largest=LARGEST, tokens=TOKENS)
    ours = predict(family, model, inputs)
    del model
    gc.collect()  # only one full-size model is in memory at a time
    want = predict_in_pytorch(family, *opened.begun().weights, inputs, None if merged else out)
    difference = float(np.linalg.norm(ours - want) / np.linalg.norm(want))
    said = f"PyTorch's predictions and ours differ by {difference:.1e} (relative), at {out}"
    if not difference <= BOUND:
        raise UserError(f"{said}: more than {BOUND:.0e}, do not use what was exported")
    LOG.info(said)
    return difference


def with_adapters(model: Any, folder: epath.Path, adapters: Adapters, component: str) -> Any:
    """Returns the model with the adapters of `folder`, whose weights include the scale."""
    adapted = dataclasses.replace(adapters, alpha=adapters.rank).attach(model)
    structure, params = parameters.split(adapted)
    found = diffusers_io.load_lora(folder, component=component, model=model)
    loaded = {path: jnp.asarray(x) for path, x in found.items()}
    return parameters.merge(structure, {**params, **loaded})


def predict(family: Family, model: Any, inputs: Inputs) -> np.ndarray:
    """Returns our model's prediction `[N, H, W, C]`."""
    structure, params = parameters.split(model)
    run = jax.jit(family.make_predict(lambda params: parameters.merge(structure, params)))
    return np.asarray(run(params, *inputs), np.float32)


def predict_in_pytorch(
    family: Family,
    source: epath.Path,
    variant: str | None,
    inputs: Inputs,
    adapters: epath.Path | None,
) -> np.ndarray:
    """Returns diffusers' prediction `[N, H, W, C]`, with a folder's adapters if one is given.

    source, variant: the component's folder, and of its weight files.
    """
    diffusers: Any = importlib.import_module("diffusers")
    torch: Any = importlib.import_module("torch")
    with storage.local_copy(source) as folder:  # diffusers reads no gs://
        model = getattr(diffusers, family.torch_class).from_pretrained(
            str(folder), variant=variant, torch_dtype=torch.float32
        )
    if adapters is not None:
        with storage.local_copy(adapters) as folder:
            load_adapters(diffusers, model, str(folder), family.component)
    told = jax.tree.map(torch.tensor, family.torch_inputs(*inputs))
    with torch.no_grad():
        predicted = model.eval()(**told).sample
    return family.torch_output(jax.tree.map(lambda x: x.numpy(), predicted), inputs[0].shape)


def load_adapters(diffusers: Any, model: Any, folder: str, component: str) -> None:
    """Loads a folder's adapters into PyTorch's model, as `load_lora_weights` does."""
    file = {"weight_name": diffusers_io.LORA_FILE}
    if component != "unet":
        model.load_lora_adapter(folder, prefix=component, **file)
        return
    # Of UNets the keys may be kohya's, which only the pipelines' loaders read.
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    found, alphas = loader.lora_state_dict(folder, unet_config=model.config, **file)
    loader.load_lora_into_unet(found, network_alphas=alphas, unet=model)
