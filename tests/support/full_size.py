"""The real models' configs; run as a program, PyTorch's side of `test_full_size`.

    python tests/support/full_size.py NAME FOLDER

Draws NAME's weights, saves the model into FOLDER as PyTorch does, and what it computes into
FOLDER/io.npz. A program of its own, so that its memory is free again before ours is taken.
"""

import json
import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from dmpo_jax.families.flux2 import KLEIN_4B
from dmpo_jax.families.sd3 import SD35_MEDIUM
from dmpo_jax.families.sdxl import SDXL_BASE as SDXL
from dmpo_jax.families.stable_diffusion import SD15, SD21

SDXL_VAE = {
    "sample_size": 1024,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 0,  # as the real files say, though the tokenizer's are 49406 and 49407
    "eos_token_id": 2,
    "pad_token_id": 1,
}
BIGG = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
T5_XXL = {  # 4 of its 24 layers: whole, it takes 19 GB
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 4,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
KLEIN_3_BLOCKS = {**KLEIN_4B, "num_layers": 1, "num_single_layers": 2}
Z_IMAGE_4_BLOCKS = {"n_layers": 2, "n_refiner_layers": 1}
QWEN3_2_LAYERS = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    "tie_word_embeddings": True,
}
MODELS = {  # name -> (kind, config, number of parameters, height and width of latents or images)
    "sd15_unet": ("unet", SD15, 859_520_964, (13, 9)),
    "sd21_unet": ("unet", SD21, 865_910_724, (9, 16)),
    "sdxl_unet": ("unet", SDXL, 2_567_463_684, (11, 14)),
    "sdxl_vae": ("vae", SDXL_VAE, 83_653_863, (56, 40)),
    "sdxl_text_encoder": ("clip", CLIP_L, 123_060_480, None),
    "sdxl_text_encoder_2": ("clip_projection", BIGG, 694_659_840, None),
    # With the table of positions, which is not trained: 226,492,416.
    "sd35_medium_transformer": ("sd3", SD35_MEDIUM, 2_243_171_520 + 226_492_416, (22, 12)),
    "t5_xxl_4_layers": ("t5", T5_XXL, 903_387_136, None),
    # Of full width, but not as deep: whole, they take 16, 25 and 16 GB.
    "klein_4b_3_blocks": ("flux2", KLEIN_3_BLOCKS, 685_769_728, (9, 6)),
    "z_image_4_blocks": ("z_image", Z_IMAGE_4_BLOCKS, 731_546_176, (14, 10)),
    "qwen3_4b_2_layers": ("qwen3", QWEN3_2_LAYERS, 590_820_352, None),
}
SHARDS = "3GB"


def peak_gigabytes() -> float:
    """VmHWM: the most memory that this process has held, mapped files included."""
    status = pathlib.Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kilobytes) * 1024 / 1e9


def make(kind, config):
    """The PyTorch model, its parameters not yet drawn where that can be spared."""
    import diffusers
    import torch
    import transformers

    if kind == "clip":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    if kind == "clip_projection":
        text = transformers.CLIPTextConfig(**config)
        return transformers.CLIPTextModelWithProjection(text)
    if kind == "t5":
        return transformers.T5EncoderModel(transformers.T5Config(**config))
    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "sd3": diffusers.SD3Transformer2DModel,
        "flux2": diffusers.Flux2Transformer2DModel,
        "z_image": diffusers.ZImageTransformer2DModel,
    }
    if kind == "qwen3":
        return transformers.Qwen3Model(transformers.Qwen3Config(**config))
    with torch.device("meta"):
        model = classes[kind](**config)
    assert kind == "sd3" or not list(model.buffers())
    return model.to_empty(device="cpu")


def stored_buffers(model) -> list:
    """SD3's positions: what a folder holds besides parameters."""
    kept = model.state_dict()
    buffers = model.named_buffers()
    return [x for name, x in buffers if name in kept and x.is_floating_point()]


def draw(model, generator) -> None:
    """Every parameter off its initial value, and activations of order one in every layer."""
    for name, parameter in model.named_parameters():
        parameter.data.normal_(generator=generator)
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            parameter.data.mul_(0.5)
        elif parameter.ndim > 1:
            parameter.data.mul_((parameter[0].numel()) ** -0.5)
        else:
            parameter.data.mul_(0.1).add_(float(name.endswith("weight")))
    for buffer in stored_buffers(model):
        buffer.data.normal_(generator=generator).mul_(0.5)


def compute(kind, model, size, generator) -> dict:
    """Named inputs and outputs, channels first."""
    import torch

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    if kind == "unet":
        given = {
            "sample": normal(2, 4, *size),
            "timesteps": torch.tensor([3, 871]),
            "context": normal(2, 77, model.config.cross_attention_dim),
        }
        added = {}
        if model.config.addition_embed_type:
            sizes = [[1024, 768, 0, 12, 1024, 1024], [811, 640, 5, 0, 896, 1152]]
            added = {"pooled": normal(2, 1280), "time_ids": torch.tensor(sizes).float()}
            names = {"text_embeds": added["pooled"], "time_ids": added["time_ids"]}
        out = model(*given.values(), added_cond_kwargs=names if added else None).sample
        return {**given, **added, "out": out}
    if kind == "sd3":
        given = {
            "sample": normal(2, 16, *size),
            "times": torch.tensor([37.25, 871.0]),
            "context": normal(2, 20, model.config.joint_attention_dim),
            "pooled": normal(2, model.config.pooled_projection_dim),
        }
        latents, times, context, pooled = given.values()
        return {**given, "out": model(latents, context, pooled, times).sample}
    if kind in ("flux2", "z_image"):
        return compute_flow(kind, model, size, normal)
    if kind == "qwen3":
        ids = torch.randint(0, 151643, (1, 512), generator=generator)
        out = model(ids, output_hidden_states=True)
        return {"ids": ids, "last": out.last_hidden_state, "penultimate": out.hidden_states[-2]}
    if kind == "t5":
        ids = torch.randint(3, 32000, (2, 40), generator=generator)
        return {"ids": ids, "last": model(ids).last_hidden_state}
    if kind == "vae":
        images = normal(1, 3, *size)
        moments = model.encode(images).latent_dist.parameters
        latents = normal(1, 4, 6, 5)
        decoded = model.decode(latents).sample
        return {"images": images, "moments": moments, "latents": latents, "decoded": decoded}
    ids = torch.randint(3, 49405, (3, 77), generator=generator)
    ids[:, 0] = 49406
    for row, end in enumerate((6, 30, 76)):  # the end token, then SDXL's two kinds of padding
        ids[row, end:] = 49407
        ids[row, end + 1 :] = 0 if kind == "clip_projection" else 49407
    out = model(ids, output_hidden_states=True)
    pooled = out.text_embeds if kind == "clip_projection" else out.pooler_output
    states = {"last": out.last_hidden_state, "penultimate": out.hidden_states[-2]}
    return {"ids": ids, **states, "pooled": pooled}


def compute_flow(kind, model, size, normal) -> dict:
    """Of FLUX.2 and Z-Image, which PyTorch calls with tokens and with lists."""
    import torch

    from dmpo_jax.families import family_named
    from dmpo_jax.types import Condition

    family = family_named({"flux2": "klein"}.get(kind, kind))
    facts = family.facts(model.config)
    times = torch.tensor([37.25, 871.0])
    given = {
        "sample": normal(2, facts.in_channels, *size),
        "times": times,
        "context": normal(2, 64, facts.context_width),
    }
    if facts.lengths:
        given["lengths"] = torch.tensor([17, 64])
    latents = given["sample"].permute(0, 2, 3, 1).numpy()
    context, lengths = given["context"].numpy(), given.get("lengths")
    condition = Condition(context, lengths=None if lengths is None else lengths.numpy())
    told = family.torch_inputs(latents, times.numpy(), condition)
    out = model(**tensors(told)).sample
    arrays = [x.numpy() for x in out] if isinstance(out, list) else out.numpy()
    found = family.torch_output(arrays, latents.shape).transpose(0, 3, 1, 2)
    return {**given, "out": torch.tensor(found)}


def tensors(told):
    """Arguments in NumPy, and lists of such, as PyTorch's."""
    import torch

    if isinstance(told, dict):
        return {name: tensors(value) for name, value in told.items()}
    if isinstance(told, list):
        return [tensors(value) for value in told]
    return None if told is None else torch.tensor(told)


def main(name: str, folder: str) -> None:
    import numpy as np
    import torch

    kind, config, _, size = MODELS[name]
    start = time.monotonic()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model = make(kind, config).eval()
        draw(model, generator)
        arrays = compute(kind, model, size, generator)
    model.save_pretrained(folder, max_shard_size=SHARDS)
    if kind == "t5":  # whose attention has no scale: two float32s differ by more than the bound
        rounded = arrays["last"]
        with torch.no_grad():
            arrays["last"] = model.double()(arrays["ids"]).last_hidden_state
        apart = (torch.linalg.norm(rounded - arrays["last"]) / torch.linalg.norm(rounded)).item()
        print(f"PyTorch's float32 from its float64: {apart:.1e}", file=sys.stderr)
    np.savez(pathlib.Path(folder) / "io.npz", **{k: v.numpy() for k, v in arrays.items()})
    count = sum(p.numel() for p in (*model.parameters(), *stored_buffers(model)))
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"count": count, "seconds": seconds, "peak_gb": round(peak_gigabytes(), 2)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
