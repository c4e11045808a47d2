"""A real config at tiny width: random weights, synthetic pairs, three steps, no files needed."""

import logging

import jax
import numpy as np
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config.leaves import Config
from dmpo_jax.data import raw as sources
from dmpo_jax.families import family as families
from dmpo_jax.models import parameters
from dmpo_jax.models.clip import CLIPTextModel
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.models.vae import AutoencoderKL
from dmpo_jax.parallel import processes
from dmpo_jax.toy import digits
from dmpo_jax.toy import make as make_digits

LOG = logging.getLogger(__name__)

SD = {
    "kind": "StableDiffusionPipeline",
    "unet": {
        "block_out_channels": [16, 32, 32, 32],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    },
    "text": {"text_encoder": 16},
}
SDXL = {
    "kind": "StableDiffusionXLPipeline",
    "unet": {
        "block_out_channels": [16, 32, 32],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 2],
        "attention_head_dim": [2, 4, 4],
        "cross_attention_dim": 16 + 24,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
    "text": {"text_encoder": 16, "text_encoder_2": 24},
}


def _with_image(family: dict, kind: str, channels: int) -> dict:
    """The same family for another pipeline class, whose UNet sees an image's channels too."""
    return {**family, "kind": kind, "unet": {**family["unet"], "in_channels": channels}}


FAMILIES = {
    "sd": SD,
    "sdxl": SDXL,
    "sd_edit": _with_image(SD, "StableDiffusionInstructPix2PixPipeline", 4 + 4),
    "sdxl_edit": _with_image(SDXL, "StableDiffusionXLInstructPix2PixPipeline", 4 + 4),
    "sd_inpaint": _with_image(SD, "StableDiffusionInpaintPipeline", 4 + 1 + 4),
    "sdxl_inpaint": _with_image(SDXL, "StableDiffusionXLInpaintPipeline", 4 + 1 + 4),
}


def make_debug(config: Config, workdir: epath.Path) -> Config:
    """Writes a tiny pipeline and random pairs into workdir; a config that uses them.

    The real jobs then run on them unchanged: encode, and train to `train.steps`.
    """
    family = FAMILIES[config.debug.family]
    kind = jax.devices()[0].platform
    LOG.info(
        "debug run: a tiny random %s model, synthetic pairs, on %s",
        config.debug.family,
        "CPU, since JAX sees no GPU or TPU" if kind == "cpu" else kind.upper(),
    )
    model, pairs = workdir / "debug_model", workdir / "debug_pairs.parquet"
    missing = not (model / "model_index.json").exists()
    processes.barrier("all have looked")
    if missing:
        write_tiny_pipeline(model, family)  # on every process: saving is done together
    if jax.process_index() == 0 and not pairs.exists():
        image = families.FAMILIES[family["kind"]].image
        sources.write_pick_a_pic(pairs, synthetic_pairs(64, image=image))
    processes.barrier("debug files")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.folder = str(model)
        config.model.vae = ""
        config.data.source = f"pickapic:{pairs}"
        config.data.encoded, config.data.mix, config.data.flip = "", None, False
        config.jobs = ("encode", "train")
    return config


def write_tiny_pipeline(out: epath.Path, family: dict) -> None:
    """A pipeline folder of the family's own parts, a few hundred thousand random parameters."""
    out.mkdir(parents=True, exist_ok=True)
    tokens = make_digits.TOKENS
    index = dict(make_digits.INDEX)
    for i, (part, width) in enumerate(family["text"].items()):
        tokenizer = part.replace("text_encoder", "tokenizer")
        vocabulary = make_digits.write_tokenizer(out / tokenizer)
        projects = i == 1  # SDXL's second encoder
        kind = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
        text = {
            **make_digits.TEXT,
            "architectures": [kind],
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "projection_dim": width,
            "max_position_embeddings": tokens,
            "vocab_size": len(vocabulary),
            **{f"{k}_token_id": vocabulary[f"<|{t}|>"] for k, t in make_digits.SPECIAL.items()},
        }
        encoder = parameters.initialise(CLIPTextModel, text, i, projection=projects)
        diffusers_io.save_text_encoder(encoder, out / part)
        index |= {part: ("transformers", kind), tokenizer: ("transformers", "CLIPTokenizer")}
    small = {**make_digits.VAE, "block_out_channels": [8, 8, 16]}
    vae = parameters.initialise(AutoencoderKL, small, 2)
    diffusers_io.save_vae(vae, out / "vae")
    unet = {**make_digits.UNET, "sample_size": 8, **family["unet"]}
    diffusers_io.save_unet(parameters.initialise(UNet2DConditionModel, unet, 3), out / "unet")
    (out / "scheduler").mkdir(exist_ok=True)
    diffusers_io.write_json(out / "scheduler" / "scheduler_config.json", make_digits.SCHEDULER)
    diffusers_io.write_json(
        out / "model_index.json", diffusers_io.make_index(family["kind"], index)
    )


def synthetic_pairs(count: int, *, image: str = "") -> list[dict]:
    """Random images with the digits' captions, labels of all three kinds.

    image: a `Family.image`; gives each pair a source to "edit", and a mask to "inpaint" by.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2 * count, 48, 40, 3), np.uint8)
    given = rng.integers(0, 256, (count, 40, 48, 3), np.uint8)
    rows = [
        {
            "caption": digits.CAPTIONS[i % 10],
            "jpg_0": sources.encode_image(images[2 * i]),
            "jpg_1": sources.encode_image(images[2 * i + 1]),
            "label_0": (1.0, 0.0, 0.5)[i % 3],
            "label_1": (0.0, 1.0, 0.5)[i % 3],
            "has_label": True,
            "are_different": True,
        }
        for i in range(count)
    ]
    for row, source in zip(rows, given, strict=True):
        if image:
            row["jpg_source"] = sources.encode_image(source)
        if image == "inpaint":
            row["mask"] = sources.encode_image(_rectangle(rng, *source.shape[:2]))
    return rows


def _rectangle(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A white rectangle on black, RGB."""
    mask = np.zeros((height, width, 3), np.uint8)
    top, left = rng.integers(0, (height // 2, width // 2))
    mask[top : top + height // 2, left : left + width // 2] = 255
    return mask
