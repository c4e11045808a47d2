"""An SD3 pipeline folder as PyTorch diffusers writes it, tiny, with and without T5."""

import diffusers
import transformers
from etils import epath

from dmpo_jax.toy import make as make_digits
from tests.support.torch_models import randomise

SIDE = 32  # of the images; the VAE makes 8 of it
WIDTHS = (16, 24)  # of the two CLIPs
TRANSFORMER = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "caption_projection_dim": 16,
    "pooled_projection_dim": sum(WIDTHS),
    "in_channels": 16,
    "out_channels": 16,
    "pos_embed_max_size": 9,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}
VAE = {
    "sample_size": SIDE,
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


def write(folder, *, t5: bool = True, **vae) -> str:
    """The pipeline in `folder`; `vae` changes its VAE's config."""
    folder = epath.Path(folder)
    parts = {
        "vae": randomise(diffusers.AutoencoderKL(**{**VAE, **vae}), 2),
        "transformer": randomise(diffusers.SD3Transformer2DModel(**TRANSFORMER), 1),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "tokenizer_3": None,
        "text_encoder_3": None,
    }
    for i, (suffix, act) in enumerate((("", "quick_gelu"), ("_2", "gelu"))):
        tokenizer, encoder = _clip(folder.parent / f"words{i}", act, i)
        parts |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
    if t5:
        tokenizer, encoder = _t5(folder.parent / "words2")
        parts |= {"tokenizer_3": tokenizer, "text_encoder_3": encoder}
    diffusers.StableDiffusion3Pipeline(**parts).save_pretrained(str(folder))
    return str(folder)


def open_in_pytorch(folder) -> diffusers.StableDiffusion3Pipeline:
    there = (epath.Path(folder) / "text_encoder_3").exists()
    none = {} if there else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(str(folder), **none)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _clip(folder: epath.Path, act: str, i: int):
    """(tokenizer, text encoder); the second one pads with another token."""
    vocabulary = make_digits.write_tokenizer(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    if i:
        tokenizer.pad_token = "<|startoftext|>"
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTHS[i],
        intermediate_size=2 * WIDTHS[i],
        projection_dim=WIDTHS[i],
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=make_digits.TOKENS,
        hidden_act=act,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, randomise(transformers.CLIPTextModelWithProjection(config), 3 + i)


def _t5(folder: epath.Path):
    words = make_digits.write_t5_tokenizer(folder)
    config = transformers.T5Config(
        vocab_size=words,
        d_model=TRANSFORMER["joint_attention_dim"],
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    tokenizer = transformers.T5TokenizerFast.from_pretrained(str(folder))
    return tokenizer, randomise(transformers.T5EncoderModel(config), 5)
