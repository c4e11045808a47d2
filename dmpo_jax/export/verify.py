"""What was exported, opened in PyTorch and run beside our own UNet on the same inputs."""

import gc
import importlib
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import leaves as configs
from dmpo_jax.models import lora, parameters

LOG = logging.getLogger(__name__)
LARGEST = 32  # latents' side: full size takes minutes on a CPU and shows no more
BOUND = 1e-3  # relative; float32 gives about 1e-6, float16 weights the same


def verify_unet(out: epath.Path, config: configs.Config) -> float:
    """The relative difference between PyTorch's predictions and ours, logged.

    Args:
        out: what `convert` wrote: a pipeline, or adapters for the config's model.

    Raises:
        ValueError: PyTorch or diffusers is missing, or the difference exceeds 1e-3.
    """
    try:
        diffusers: Any = importlib.import_module("diffusers")
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise ValueError(
            f"verifying needs PyTorch diffusers ({error}): pip install 'dmpo_jax[eval]'"
        ) from error
    merged = (out / "model_index.json").exists()
    source = out if merged else diffusers_io.find_folder(config.model.folder)
    variant = None if merged else config.model.variant or None
    unet = diffusers_io.load_model(source, variant=variant)
    if not merged:
        unet = with_adapters(unet, out, config)
    inputs = make_inputs(unet.config)
    ours = predict(unet, inputs)
    del unet
    gc.collect()  # a full-size model is held once at a time
    theirs = diffusers.UNet2DConditionModel.from_pretrained(
        str(source / "unet"), variant=variant, torch_dtype=torch.float32
    )
    if not merged:
        theirs.load_lora_adapter(str(out), weight_name=diffusers_io.LORA_FILE, prefix="unet")
    nchw = torch.tensor(inputs["latents"].transpose(0, 3, 1, 2))
    added = {k: torch.tensor(inputs[k]) for k in ("text_embeds", "time_ids") if k in inputs}
    with torch.no_grad():
        predicted = theirs.eval()(
            nchw,
            torch.tensor(inputs["timesteps"]),
            encoder_hidden_states=torch.tensor(inputs["context"]),
            added_cond_kwargs=added,
        ).sample
    want = predicted.numpy().transpose(0, 2, 3, 1)
    difference = float(np.linalg.norm(ours - want) / np.linalg.norm(want))
    said = f"PyTorch's predictions and ours differ by {difference:.1e} (relative), at {out}"
    if not difference <= BOUND:
        raise ValueError(f"{said}: more than {BOUND:.0e}, do not use what was exported")
    LOG.info(said)
    return difference


def with_adapters(unet: Any, folder: epath.Path, config: configs.Config) -> Any:
    """The UNet with the adapters of `folder`, whose scale is in them."""
    adapted = lora.attach(
        unet,
        rank=config.lora.rank,
        alpha=config.lora.rank,
        targets=config.lora.targets,
        seed=0,
    )
    structure, params = parameters.split(adapted)
    loaded = {path: jnp.asarray(x) for path, x in diffusers_io.load_lora(folder).items()}
    return parameters.merge(structure, {**params, **loaded})


def make_inputs(config: Any) -> dict[str, np.ndarray]:
    """Random inputs of two images; those of SDXL's conditioning by diffusers' names."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    size = config.sample_size or LARGEST
    height, width = [min(n, LARGEST) for n in ([size] * 2 if isinstance(size, int) else size)]
    inputs = {
        "latents": normal(2, height, width, config.in_channels),
        "timesteps": np.array([37, 901]),
        "context": normal(2, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type:
        sizes = 6 * config.addition_time_embed_dim
        inputs["text_embeds"] = normal(2, config.projection_class_embeddings_input_dim - sizes)
        inputs["time_ids"] = np.array([[1024, 768, 0, 12, 1024, 1024]] * 2, np.float32)
    return inputs


def predict(unet: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    structure, params = parameters.split(unet)

    @jax.jit
    def run(params, latents, timesteps, context, text_embeds=None, time_ids=None):
        unet = parameters.merge(structure, params)
        return unet(latents, timesteps, context, text_embeds, time_ids)

    return np.asarray(run(params, **inputs), np.float32)
