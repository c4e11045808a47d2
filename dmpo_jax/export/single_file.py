"""Converts one checkpoint file, as model sites distribute it, to a diffusers pipeline folder."""

import logging

from etils import epath
from safetensors import safe_open

from dmpo_jax.errors import UserError
from dmpo_jax.extras import install_hint

LOG = logging.getLogger(__name__)
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CLASSES = {  # input channels of the UNet -> class; SDXL's has XL in its name
    4: "StableDiffusion{}Pipeline",
    8: "StableDiffusion{}InstructPix2PixPipeline",
    9: "StableDiffusion{}InpaintPipeline",
}


def convert_single_file(file: epath.PathLike, out: epath.PathLike, *, like: str = "") -> str:
    """Writes the pipeline that a single `.safetensors` file holds, through PyTorch diffusers.

    Args:
        file: in the original layout of Stable Diffusion's or SDXL's own repositories.
        like: a pipeline folder of the same architecture that provides the configs and
            tokenizers; "" lets diffusers fetch them from the hub.

    Returns:
        The pipeline's class.

    Raises:
        ValueError: PyTorch diffusers is missing; the file is a pickle or cannot be
            converted; `out` already holds a pipeline.
    """
    file, out = epath.Path(file), epath.Path(out)
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is no .safetensors file; others may be pickles and are not read")
    if not file.exists():
        raise UserError(f"{file} does not exist")
    if (out / "model_index.json").exists():
        raise UserError(f"{out} holds a pipeline already: choose another --out")
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"converting needs PyTorch diffusers ({error}): {install_hint('eval')}"
        ) from error
    kind = pipeline_class(file)
    LOG.info("converting %s as a %s ...", file, kind)
    try:
        pipeline = getattr(diffusers, kind).from_single_file(
            str(file), config=like or None, local_files_only=bool(like)
        )
    except Exception as error:  # diffusers, the hub and torch raise many types
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"diffusers cannot convert {file}: {reason}") from error
    pipeline.save_pretrained(str(out))
    return kind


def pipeline_class(file: epath.PathLike) -> str:
    """Returns the diffusers class of a file, by the names and shapes of its tensors."""
    try:
        with safe_open(str(file), framework="numpy") as tensors:
            names = set(tensors.keys())
            channels = tensors.get_slice(FIRST).get_shape()[1] if FIRST in names else None
    except Exception as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}") from error
    if channels not in CLASSES:
        raise UserError(
            f"{file} holds no Stable Diffusion of the original layout ({FIRST} is missing, or "
            f"takes {channels} channels, not one of {sorted(CLASSES)})"
        )
    xl = any(name.startswith("conditioner.embedders.1.") for name in names)
    return CLASSES[channels].format("XL" if xl else "")
