"""PyTorch diffusers and transformers models with random weights, off their initialisation."""

import torch

UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
SD15 = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
    "attention_head_dim": 8,
}
SD2 = {**SD15, "attention_head_dim": [2, 4, 8], "use_linear_projection": True}
SDXL = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 8],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 20 + 6 * 16,
}
REFINER = {  # attention in the middle stage alone, one depth for all
    **SDXL,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 2,
}
# name -> (config, latent height and width). Small and shallow: compiling dominates.
UNETS = {
    "small": ({}, (8, 8)),
    "sd15": (SD15, (9, 7)),  # odd, so that upsampling must be cut
    "sdxl": (SDXL, (8, 8)),
    "sd2": ({**SD2, "upcast_attention": True}, (8, 8)),
    "sdxl_odd_size": (SDXL, (5, 7)),
    "refiner": (REFINER, (8, 8)),
    "inpainting": ({"in_channels": 9}, (8, 16)),
    "edit": ({"in_channels": 8}, (8, 8)),
    "layers_by_block": ({"layers_per_block": [1, 2]}, (8, 8)),
    "sine_first": ({"flip_sin_to_cos": False, "freq_shift": 1, "act_fn": "mish"}, (8, 8)),
    "asymmetric_pad": ({"downsample_padding": 0, "time_embedding_dim": 48}, (8, 8)),
    "wide_kernels": ({"conv_in_kernel": 5, "conv_out_kernel": 1}, (8, 8)),
}
VAE = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
DEEP_VAE = {
    **VAE,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
}
VAES = {
    "sd": (DEEP_VAE, (32, 32)),
    "sdxl": ({**VAE, "scaling_factor": 0.13025, "force_upcast": True}, (16, 24)),
    "no_mid_attention": ({**VAE, "mid_block_add_attention": False}, (16, 16)),
    "no_quant": ({**VAE, "use_quant_conv": False, "use_post_quant_conv": False}, (16, 16)),
    "16_channels": ({**VAE, "latent_channels": 16}, (10, 14)),
}
CLIP = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_dim": 20,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 1,
}
CLIPS = {
    "clip_l": (CLIP, False),
    "openclip_h": ({**CLIP, "hidden_act": "gelu"}, False),
    "bigg": ({**CLIP, "hidden_act": "gelu"}, True),
    "legacy_eos": ({**CLIP, "eos_token_id": 2}, False),
}
SD3 = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "pos_embed_max_size": 7,
}
SD3S = {  # name -> (config, latent height and width)
    "sd3": (SD3, (8, 8)),
    "sd35_dual": ({**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, (8, 8)),
    "sd35_large": ({**SD3, "qk_norm": "rms_norm", "num_layers": 2}, (8, 8)),
    # An odd and an even number of patches, so that the two margins of the crop differ.
    "odd_sizes": (SD3, (6, 12)),
    "three_by_three": ({**SD3, "patch_size": 3, "out_channels": 5}, (9, 15)),
}
T5 = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 4,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 5,
    "feed_forward_proj": "gated-gelu",
}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter moved off its initialisation, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(noise * (0.1 * spread + 0.03))
    return model.eval()


def unet(name: str, seed: int = 0):
    from diffusers import UNet2DConditionModel

    return randomise(UNet2DConditionModel(**{**UNET, **UNETS[name][0]}), seed)


def vae(name: str, seed: int = 0):
    from diffusers import AutoencoderKL

    return randomise(AutoencoderKL(**VAES[name][0]), seed)


def clip(name: str, seed: int = 0):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config, projection = CLIPS[name]
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return randomise(kind(CLIPTextConfig(**config)), seed)


def sd3(name: str, seed: int = 0):
    from diffusers import SD3Transformer2DModel

    return randomise(SD3Transformer2DModel(**SD3S[name][0]), seed)


def t5(seed: int = 0):
    from transformers import T5Config, T5EncoderModel

    return randomise(T5EncoderModel(T5Config(**T5)), seed)
