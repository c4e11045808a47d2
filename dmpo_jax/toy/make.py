"""Makes the embedded digits pipeline: tokenizer, text encoder, VAE and an untrained UNet.

The output folder has the layout of PyTorch diffusers. It also holds `real_digits.parquet`, the
real digits as preference pairs, on which `configs/digits_base.py` trains the UNet.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data import sources
from dmpo_jax.models import parameters
from dmpo_jax.models.clip import CLIPTextModel
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.models.vae import AutoencoderKL
from dmpo_jax.progress import Progress
from dmpo_jax.toy import digits

TOKENS = 8  # of a prompt: start, words, end, padding

UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "sample_size": digits.SIZE,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "projection_dim": 32,
    "hidden_act": "quick_gelu",
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
INDEX = {
    "scheduler": ("diffusers", "DDIMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    # Optional parts of a StableDiffusionPipeline.
    "safety_checker": (None, None),
    "feature_extractor": (None, None),
    "image_encoder": (None, None),
}


def write_digits(out: epath.PathLike, *, seed: int, vae_steps: int) -> None:
    """Writes the pipeline folder and the real digits' pairs into `out`; takes minutes on a CPU."""
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(out / "tokenizer")
    ids = {f"{k}_token_id": vocabulary[f"<|{t}|>"] for k, t in SPECIAL.items()}
    config = {**TEXT, "vocab_size": len(vocabulary), **ids}
    text = parameters.initialise(CLIPTextModel, config, seed)
    diffusers_io.save_text_encoder(text, out / "text_encoder")
    diffusers_io.save_vae(train_vae(seed=seed, steps=vae_steps), out / "vae")
    unet = parameters.initialise(UNet2DConditionModel, UNET, seed)
    diffusers_io.save_unet(unet, out / "unet")
    (out / "scheduler").mkdir(exist_ok=True)
    storage.write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    (out / "prompts.txt").write_text("\n".join(digits.CAPTIONS) + "\n")
    sources.write_pick_a_pic(out / "real_digits.parquet", real_pairs(seed))
    index = diffusers_io.make_index("StableDiffusionPipeline", INDEX)
    storage.write_json(out / "model_index.json", index | {"requires_safety_checker": False})


SPECIAL = {"bos": "startoftext", "eos": "endoftext", "pad": "endoftext"}


def write_tokenizer(folder: epath.Path) -> dict[str, int]:
    """Writes a CLIPTokenizer over the captions' words; returns its vocabulary.

    Byte-pair merges build each word from its letters. As in CLIP's own, a known word is one token
    and an unknown one falls back to letters.
    """
    words = sorted({word for caption in digits.CAPTIONS for word in caption.split()})
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens, merges = [*letters, *(f"{x}</w>" for x in letters)], []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            left, right, *rest = parts
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                tokens.append(left + right)
            parts = [left + right, *rest]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "pad_token": end, "unk_token": end}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return vocabulary


def write_t5_tokenizer(folder: epath.Path) -> int:
    """Writes a T5TokenizerFast over the captions' words; returns the size of its vocabulary.

    A known word is one token and an unknown one falls back to letters.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors  # of transformers

    pad, end, unknown = "<pad>", "</s>", "<unk>"
    words = sorted({word for caption in digits.CAPTIONS for word in caption.split()})
    scored = [(token, 0.0) for token in (pad, end, unknown)]
    scored += [(f"▁{word}", -1.0) for word in words]
    scored += [(token, -9.0) for token in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    special = {"eos_token": end, "pad_token": pad, "unk_token": unknown}
    config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": 512, "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))
    return len(scored)


# As Qwen3's own: a reply begins with empty thoughts only if thinking is switched off.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def write_qwen2_tokenizer(folder: epath.Path) -> int:
    """Writes a Qwen2Tokenizer, with a chat template; returns the size of its vocabulary.

    A byte is one token, as are the marks of a chat.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    end, special = "<|endoftext|>", ("<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in (end, *special)])
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 1024,
        "pad_token": end,
        "eos_token": special[1],
        "unk_token": None,
        "bos_token": None,
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def train_vae(*, seed: int, steps: int, batch_size: int = 64) -> AutoencoderKL:
    """Trains the small VAE on all real digits: squared error plus a light KL to the unit normal.

    Sets `scaling_factor` to the inverse standard deviation of the latents, as in Stable Diffusion.
    """
    images = digits.to_images(digits.load_digits()[0]).astype(np.float32) / 127.5 - 1
    structure, params = parameters.split(parameters.initialise(AutoencoderKL, VAE, seed))
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def loss_fn(params, batch, key):
        vae = parameters.merge(structure, params)
        mean, logvar = jnp.split(vae.encode(batch), 2, axis=-1)
        logvar = jnp.clip(logvar, -30, 20)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = jnp.square(vae.decode(latents) - batch).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
        return error + 1e-3 * kl, error

    @jax.jit
    def step(params, opt_state, batch, key):
        (_, error), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, error

    opt_state, key, error = tx.init(params), jax.random.key(seed), jnp.zeros(())
    order = np.random.default_rng(seed)
    with Progress(steps, 0, "digits VAE") as progress:
        for i in range(steps):
            batch = images[order.integers(0, len(images), batch_size)]
            params, opt_state, error = step(params, opt_state, batch, jax.random.fold_in(key, i))
            progress.advance(1, **({"loss": float(error)} if i % 50 == 0 else {}))
    vae = parameters.merge(structure, params)
    means = jax.jit(lambda x: vae.encode(x)[..., : VAE["latent_channels"]])(images[:512])
    config: dict[str, Any] = {**VAE, "scaling_factor": float(1 / np.std(means))}
    structure, _ = parameters.split(parameters.initialise(AutoencoderKL, config, seed))
    return parameters.merge(structure, params)


def real_pairs(seed: int) -> list[dict[str, Any]]:
    """Returns one pair for each real digit, preferred to a random one of another label."""
    ink, labels = digits.load_digits()
    jpegs = [sources.encode_image(image) for image in digits.to_images(ink)]
    rng = np.random.default_rng(seed)
    rows = []
    for i, label in enumerate(labels):
        other = rng.choice(np.flatnonzero(labels != label))
        rows.append(
            {
                "caption": digits.CAPTIONS[label],
                "jpg_0": jpegs[i],
                "jpg_1": jpegs[other],
                "label_0": 1.0,
                "label_1": 0.0,
                "has_label": True,
                "are_different": True,
                "image_0_uid": f"digit-{i}",
                "image_1_uid": f"digit-{other}",
                "best_image_uid": f"digit-{i}",
            }
        )
    return rows
