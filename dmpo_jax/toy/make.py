"""Makes the embedded digits pipelines: tokenizers, text encoders, VAE and an untrained model.

The output folder has the layout of PyTorch diffusers. It also holds `real_digits.parquet`, the
real digits as preference pairs, on which `configs/digits_base.py` trains a UNet and
`configs/digits_flow_base.py` a transformer.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data import sources
from dmpo_jax.families import Family, family_named
from dmpo_jax.families.family import TextPart
from dmpo_jax.models import parameters
from dmpo_jax.models.clip import CLIPTextModel
from dmpo_jax.models.qwen3 import Qwen3Model
from dmpo_jax.models.sd3 import sincos_table
from dmpo_jax.models.t5 import T5EncoderModel
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
T5 = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# 16 tokens of the image beside 8 of the text and 256 zeros for the absent T5: few heads and
# blocks keep it quick.
TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 48,
    "num_attention_heads": 2,
    "joint_attention_dim": 96,
    "caption_projection_dim": 96,
    "pooled_projection_dim": 32 + 48,
    "pos_embed_max_size": 4,
    "qk_norm": "rms_norm",
    "dual_attention_layers": [0],
}
FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}
PROJECTS = {"architectures": ["CLIPTextModelWithProjection"]}


class Configs(NamedTuple):
    """Configs of a pipeline's parts.

    model, vae, scheduler: of these parts. text: part -> changes to TEXT, or all of an encoder
    that is not CLIP's. index: entries of model_index.json for what the pipeline does without.
    buffers: arrays of the model that are not trained, by dotted path, each from its config.
    """

    model: Mapping[str, Any]
    text: Mapping[str, Mapping[str, Any]]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any] = {}
    buffers: Mapping[str, Callable[[Mapping[str, Any]], np.ndarray]] = {}


NONE = (None, None)
NO_CHECKER = {"safety_checker": NONE, "feature_extractor": NONE, "image_encoder": NONE}
# By the name of the family.
DIGITS = {
    "sd": Configs(
        UNET,
        {"text_encoder": {}},
        VAE,
        SCHEDULER,
        {**NO_CHECKER, "requires_safety_checker": False},
    ),
    "sd3": Configs(
        TRANSFORMER,
        {
            "text_encoder": PROJECTS,
            "text_encoder_2": {"hidden_size": 48, "hidden_act": "gelu", **PROJECTS},
        },
        {**VAE, "shift_factor": 0.0},
        FLOW,
        {"text_encoder_3": NONE, "tokenizer_3": NONE},
        {"pos_embed.pos_embed": sincos_table},
    ),
}


def write_digits(
    out: epath.PathLike, *, family: str = "sd", vae: str = "", seed: int, vae_steps: int
) -> None:
    """Writes the pipeline folder and the real digits' pairs into `out`.

    family: one of DIGITS. vae: folder of a VAE to take; "" trains one, minutes on a CPU.
    """
    out, configs = epath.Path(out), DIGITS[family]
    found = diffusers_io.load_vae(vae) if vae else train_vae(seed=seed, steps=vae_steps)
    made = with_factors(found, configs.vae)
    kind = family_named(family)
    structure, params = parameters.split(
        parameters.initialise(kind.model, dict(configs.model), seed)
    )
    tables = {path: jnp.asarray(make(configs.model)) for path, make in configs.buffers.items()}
    model = parameters.merge(structure, params | tables)
    write_pipeline(out, kind, configs, vae=made, model=model, seed=seed)
    (out / "prompts.txt").write_text("\n".join(digits.CAPTIONS) + "\n")
    sources.write_pick_a_pic(out / "real_digits.parquet", real_pairs(seed))


def write_pipeline(
    out: epath.Path, family: Family, configs: Configs, *, vae: Any, model: Any, seed: int
) -> None:
    """Writes a pipeline of this VAE and model, with random text encoders, into a folder.

    Every process must call it: saving is collective.
    """
    out.mkdir(parents=True, exist_ok=True)
    index = {
        "scheduler": ("diffusers", configs.scheduler["_class_name"]),
        "vae": ("diffusers", family.vae.__name__),
        family.component: ("diffusers", family.torch_class),
    }
    for i, part in enumerate(family.text):
        if part.name in configs.text:
            kind, tokenizer = _write_text(out, part, configs.text[part.name], seed + i)
            index[part.name] = ("transformers", kind)
            index[part.tokenizer] = ("transformers", tokenizer)
    diffusers_io.save_vae(vae, out / "vae")
    diffusers_io.save_model(model, out / family.component)
    index = diffusers_io.make_index(family.pipeline, index) | dict(configs.index)
    if jax.process_index() == 0:
        (out / "scheduler").mkdir(exist_ok=True)
        storage.write_json(out / "scheduler" / "scheduler_config.json", configs.scheduler)
        storage.write_json(out / "model_index.json", index)


def _write_text(
    out: epath.Path, part: TextPart, changes: Mapping[str, Any], seed: int
) -> tuple[str, str]:
    """Writes a tokenizer and its text encoder; returns the encoder's and the tokenizer's class."""
    (kind,) = changes.get("architectures", TEXT["architectures"])
    if kind == "T5EncoderModel":
        words = write_t5_tokenizer(out / part.tokenizer)
        encoder = parameters.initialise(
            T5EncoderModel, {**T5, "vocab_size": words, **changes}, seed
        )
        diffusers_io.save_text_encoder(encoder, out / part.name)
        return kind, "T5TokenizerFast"
    if kind.startswith("Qwen3"):
        words = write_qwen2_tokenizer(out / part.tokenizer)
        text = {"vocab_size": words, **changes}
        diffusers_io.save_text_encoder(
            parameters.initialise(Qwen3Model, text, seed), out / part.name
        )
        return kind, "Qwen2Tokenizer"
    vocabulary = write_tokenizer(out / part.tokenizer)
    width = changes.get("hidden_size", TEXT["hidden_size"])
    text = {
        **TEXT,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "max_position_embeddings": TOKENS,
        "vocab_size": len(vocabulary),
        **{f"{k}_token_id": vocabulary[f"<|{t}|>"] for k, t in SPECIAL.items()},
        **changes,
    }
    projects = kind == "CLIPTextModelWithProjection"
    encoder = parameters.initialise(CLIPTextModel, text, seed, projection=projects)
    diffusers_io.save_text_encoder(encoder, out / part.name)
    return kind, "CLIPTokenizer"


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
    """Trains the small VAE on all real digits: squared error plus a light KL to the unit normal."""
    images = _pixels()
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
    return parameters.merge(structure, params)


def with_factors(vae: AutoencoderKL, config: Mapping[str, Any]) -> AutoencoderKL:
    """Returns the VAE with the factors of its latents of real digits.

    `scaling_factor` is their inverse standard deviation, as in Stable Diffusion; a `shift_factor`
    that the config has is their mean, as in Stable Diffusion 3.
    """
    means = jax.jit(lambda x: vae.encode(x)[..., : VAE["latent_channels"]])(_pixels()[:512])
    factors = {"scaling_factor": float(1 / np.std(means))}
    if "shift_factor" in config:
        factors["shift_factor"] = float(np.mean(means))
    structure, _ = parameters.split(parameters.abstract(AutoencoderKL, {**config, **factors}))
    return parameters.merge(structure, parameters.split(vae)[1])


def _pixels() -> np.ndarray:
    """Returns all real digits `[1797, 32, 32, 3]` in [-1, 1]."""
    return digits.to_images(digits.load_digits()[0]).astype(np.float32) / 127.5 - 1


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
