"""Pipeline folders as PyTorch diffusers writes them, tiny, one of every supported kind."""

import functools
import json

import diffusers
import torch
import transformers
from etils import epath
from safetensors.torch import load_file, save_file

from dmpo_jax.toy import make as make_digits
from tests.support.torch_models import randomise

SIDE = 32  # of the images; the VAE makes 8 of it

UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
SDXL_UNET = {
    **UNET,
    "cross_attention_dim": 16 + 24,
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
VAE = {
    "sample_size": SIDE,
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
PNDM = {**BETAS, "skip_prk_steps": True, "steps_offset": 1}

# name -> (pipeline class, UNet, scheduler, its config, the text encoders' hidden_act)
SD1 = (UNET, "DDIMScheduler", DDIM, ("quick_gelu",))
XL = ("EulerDiscreteScheduler", BETAS, ("quick_gelu", "gelu"))
PIPELINES = {
    "sd15": ("StableDiffusionPipeline", *SD1),
    "legacy": ("StableDiffusionPipeline", UNET, "PNDMScheduler", PNDM, ("quick_gelu",)),
    "sd2": (
        "StableDiffusionPipeline",
        {**UNET, "use_linear_projection": True, "attention_head_dim": [1, 2]},
        "DDIMScheduler",
        {**DDIM, "prediction_type": "v_prediction"},
        ("gelu",),
    ),
    "sdxl": ("StableDiffusionXLPipeline", SDXL_UNET, *XL),
    "sd_edit": (
        "StableDiffusionInstructPix2PixPipeline",
        {**UNET, "in_channels": 8},
        *SD1[1:],
    ),
    "sd_inpaint": (
        "StableDiffusionInpaintPipeline",
        {**UNET, "in_channels": 9},
        *SD1[1:],
    ),
    "sdxl_edit": (
        "StableDiffusionXLInstructPix2PixPipeline",
        {**SDXL_UNET, "in_channels": 8},
        *XL,
    ),
    "sdxl_inpaint": ("StableDiffusionXLInpaintPipeline", {**SDXL_UNET, "in_channels": 9}, *XL),
}


def write(name: str, folder) -> str:
    """The pipeline `name` in `folder`, by PyTorch; "legacy" then as folders of 2022 are."""
    kind, unet, scheduler, schedule, acts = PIPELINES[name]
    folder = epath.Path(folder)
    parts = {
        "vae": make_vae(),
        "unet": randomise(diffusers.UNet2DConditionModel(**unet), 1),
        "scheduler": getattr(diffusers, scheduler)(**schedule),
    }
    for i, act in enumerate(acts):
        suffix = f"_{i + 1}" if i else ""
        tokenizer, encoder = _text(folder.parent / f"words{i}", act, i)
        parts |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
    if "XL" not in kind:
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    getattr(diffusers, kind)(**parts).save_pretrained(str(folder))
    if name == "legacy":
        _age(folder)
    return str(folder)


@functools.cache
def make_vae() -> diffusers.AutoencoderKL:
    return randomise(diffusers.AutoencoderKL(**VAE), 2)


def _text(folder: epath.Path, act: str, i: int):
    """(tokenizer, text encoder), SDXL's second one for i = 1."""
    vocabulary = make_digits.write_tokenizer(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    if i:  # SDXL's two pad with different tokens
        tokenizer.pad_token = "<|startoftext|>"
    width = (16, 24)[i]
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=make_digits.TOKENS,
        hidden_act=act,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=tokenizer.pad_token_id,
    )
    kinds = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    return tokenizer, randomise(kinds[i](config), 3 + i)


def _age(folder: epath.Path) -> None:
    """Names and configs as folders of 2022 have them, which today's libraries still open."""
    text = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(text)
    tensors = {
        k if k.startswith("text_model.") else f"text_model.{k}": x for k, x in tensors.items()
    }
    ids = torch.arange(make_digits.TOKENS)[None]
    save_file({**tensors, "text_model.embeddings.position_ids": ids}, text, {"format": "pt"})

    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed = {}
    for name, tensor in load_file(vae).items():
        for new, was in old.items():
            name = name.replace(new, was)
        renamed[name] = tensor
    assert any(".proj_attn." in name for name in renamed)
    save_file(renamed, vae, {"format": "pt"})

    new_keys = {
        "unet": (
            "attention_type",
            "class_embed_type",
            "conv_in_kernel",
            "time_embedding_type",
            "transformer_layers_per_block",
            "upcast_attention",
            "use_linear_projection",
        ),
        "vae": ("force_upcast", "mid_block_add_attention", "scaling_factor", "use_quant_conv"),
        "scheduler": ("prediction_type", "timestep_spacing"),
    }
    for part, keys in new_keys.items():
        stem = "scheduler_config" if part == "scheduler" else "config"
        file = folder / part / f"{stem}.json"
        config = {k: v for k, v in json.loads(file.read_text()).items() if k not in keys}
        file.write_text(json.dumps({**config, "_diffusers_version": "0.6.0"}))
