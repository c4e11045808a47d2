"""Declares every option of a config once: one class per section, one attribute per leaf.

To add one, add it here. Its help, check, flag, role in a run's identity and row of the reference
page are derived.
"""

from typing import TYPE_CHECKING, Any

from dmpo_jax.config.declare import ITSELF, Check, OneOf, Root, Section, leaf
from dmpo_jax.data.encoded.pair import SIZES
from dmpo_jax.diffusion.samplers import SAMPLERS
from dmpo_jax.diffusion.timesteps import DENSITIES, WEIGHTINGS
from dmpo_jax.encoding.plan import CHOICES
from dmpo_jax.evaluation.protocol import ESTIMANDS, PROTOCOLS
from dmpo_jax.families import FAMILIES
from dmpo_jax.models.attention import KERNELS
from dmpo_jax.models.execution import AUTO, REMAT
from dmpo_jax.objectives import ANCHORS, OBJECTIVES
from dmpo_jax.objectives.safeguard import MU
from dmpo_jax.sampling.seeds import EACH, SEEDS
from dmpo_jax.scoring.labels import LABELS
from dmpo_jax.training.build import COMPUTE, FROZEN_DTYPES
from dmpo_jax.training.optim import OPTIMIZERS, SCHEDULES, SMALLEST_EPS

JOBS = ("collect", "encode", "train", "evaluate")
DTYPES = ("bfloat16", "float32")
RUN, PROGRAM, BOTH = "run", "program", "run program"
_NAMES = Check(lambda x: all(isinstance(name, str) for name in x), "names with commas between")
_AXIS = Check(lambda x: x == -1 or x > 0, "a number of devices, or -1 for all left")
_SIDE = Check(lambda x: x > 0 and x % 8 == 0, "a positive multiple of 8")


class Objectives(Section):
    """One section per objective, with the hyperparameters that its decorator declares."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Safeguard(Section):
    mu: float | None = leaf(
        None,
        "the rejected image's gradient is held back where it undoes the chosen one's, leaving mu "
        "of its step (winner-preserving); unset: not",
        MU.within,
        affects=BOTH,
        counts_with=ITSELF,
    )


class Anchor(Section):
    kind: str = leaf(
        "",
        "added to any objective: sft, the chosen image's own error, or hinge, by how much it is "
        "predicted worse than by the reference; '' adds nothing",
        OneOf(("", *ANCHORS)),
        affects=BOTH,
        counts_with=ITSELF,
    )
    weight: float = leaf(1.0, "of the anchor", "(0, inf)", affects=BOTH, counts_with="anchor.kind")


class Reference(Section):
    decay: float | None = leaf(
        None,
        "the reference follows the policy: what is kept of it at each move, 0 taking the policy "
        "itself (linear_dpo 0.95 to 0.995, nft 0.5 to 0.999); unset: it is fixed",
        "[0, 1]",
        affects=BOTH,
        counts_with=ITSELF,
    )
    every: int = leaf(
        1, "updates between two moves", "[1, inf)", affects=BOTH, counts_with="reference.decay"
    )


# low and high count if one of these differs from its default.
_CUT = "timesteps.weighting timesteps.low timesteps.high"


class Timesteps(Section):
    weighting: str = leaf(
        "uniform",
        "of the loss by timestep",
        OneOf(WEIGHTINGS),
        affects=BOTH,
        counts_with=ITSELF,
    )
    gamma: float = leaf(
        5.0,
        "of min_snr: the signal-to-noise ratio at which weights are cut",
        "(0, inf)",
        affects=BOTH,
        counts_with="timesteps.weighting",
    )
    low: float = leaf(
        0.0,
        "least noise trained on, as a fraction of the timesteps",
        "[0, 1)",
        affects=BOTH,
        counts_with=_CUT,
    )
    high: float = leaf(
        1.0, "most noise trained on, likewise", "(0, 1]", affects=BOTH, counts_with=_CUT
    )
    density: str = leaf(
        "uniform",
        "of the timesteps drawn",
        OneOf(DENSITIES),
        affects=BOTH,
        counts_with=ITSELF,
    )
    mean: float = leaf(
        0.0,
        "of logit_normal's logit: higher is less noise",
        "(-inf, inf)",
        affects=BOTH,
        counts_with="timesteps.density",
    )
    std: float = leaf(
        1.0,
        "of logit_normal's logit",
        "(0, inf)",
        affects=BOTH,
        counts_with="timesteps.density",
    )
    shift: float | None = leaf(
        None,
        "of flow noise, towards more of it; unset: the scheduler's own where it is static",
        "(0, inf)",
        affects=BOTH,
        counts_with=ITSELF,
    )


class Model(Section):
    folder: str = leaf(
        "",
        "diffusers pipeline folder or hub id[@revision]; '' must be set",
        affects=RUN,
        content="model weights",
    )
    variant: str = leaf(
        "",
        "of folder's weight files: 'fp16' reads *.fp16.safetensors; '' reads the plain",
        affects=RUN,
    )
    vae: str = leaf(
        "",
        "another VAE's folder, such as SDXL's fp16 fix; '' takes the pipeline's",
        affects=RUN,
        counts_with=ITSELF,
        content="encoded pairs",  # which it has made
    )
    start: str = leaf(
        "",
        "what training starts from, such as an SFT model, in place of folder's own denoiser: a "
        "folder of the same architecture (a pipeline's, or the denoiser's own) or hub id, or a "
        "LoRA file on top of folder's. With lora.rank a LoRA file is the adapters' first value, "
        "and a folder what they are trained on; without, a file is merged. '' is folder's own",
        affects=RUN,
        counts_with=ITSELF,
        content="start weights",
    )
    reference: str = leaf(
        "",
        "what margins are measured against, frozen; as start. With lora.rank: a LoRA file of the "
        "same rank and layers, or the model that the adapters are on. '' is the start",
        affects=RUN,
        counts_with=ITSELF,
        content="reference weights",
    )
    compute_dtype: str = leaf(
        "bfloat16",
        "of activations; parameters are always float32",
        OneOf(DTYPES),
        affects=BOTH,
    )
    frozen_dtype: str = leaf(
        COMPUTE,
        "of frozen kernels: compute is compute_dtype; int8 takes half of bfloat16's memory (first "
        "and last layers and norms stay). With lora.rank the base under policy and reference "
        "alike; without, the reference alone, whose margins then do not begin at 0",
        OneOf(FROZEN_DTYPES),
        affects=BOTH,
        counts_with=ITSELF,
    )
    attention: str = leaf(
        AUTO,
        "auto: cudnn on GPU, splash on TPU, else plain",
        OneOf((AUTO, *KERNELS)),
        affects=PROGRAM,
    )
    remat: str = leaf(
        "none",
        "what a backward computes again, to save memory: none (kernels gathered over mesh.fsdp "
        "are kept too), block (resnets and spatial transformers), transformer (resnets and "
        "transformer blocks), offload (and what is kept goes to the host)",
        OneOf(REMAT),
        affects=PROGRAM,
    )
    scan: bool = leaf(
        False,
        "compile equal transformer blocks once, as a loop (SDXL has 70); on GPUs one by one "
        "either way, which moves less memory",
        affects=PROGRAM,
    )


class Data(Section):
    source: str = leaf(
        "",
        "raw pairs, KIND:PATH, for the encode job; '' takes what collect made",
        affects=RUN,
        content="encoded pairs",
    )
    encoded: str = leaf(
        "",
        "folder of encoded pairs; '' is WORKDIR/encoded",
        affects=RUN,
        content="encoded pairs",
    )
    mix: tuple[str, ...] | None = leaf(
        None,
        "instead of data.encoded: several such folders, each FOLDER=WEIGHT, of the pairs",
        affects=RUN,
        counts_with=ITSELF,
        content="encoded pairs",
    )
    prompts: str = leaf(
        "",
        "folder of the prompts' embeddings, which encode takes in place of the text encoders': "
        "encoded pairs, or prompts.txt and *.safetensors; '' embeds them",
    )
    any_encoders: bool = leaf(
        False, "train on pairs that other weights of the VAE or a text encoder made"
    )
    flip: bool = leaf(
        False,
        "train on half of the pairs flipped; encode stores them flipped too, twice the bytes",
        affects=RUN,
        counts_with=ITSELF,
    )
    flip_each: bool = leaf(
        False,
        "with data.flip: each image of a pair is flipped by itself, as published scripts do; "
        "otherwise both or neither",
        affects=RUN,
        counts_with=ITSELF,
    )
    sizes: str = leaf(
        "own",
        "what SDXL is told of an image: own, its original size and crop; or resolution, those of "
        "an uncropped image at the resolution, as published scripts do and sampling does",
        OneOf(SIZES),
        affects=RUN,
        counts_with=ITSELF,
    )
    moments: str = leaf(
        "sample",
        "what encode keeps of an image: sample (mean, variance) or mean, half the bytes",
        OneOf(CHOICES["moments"]),
    )
    moments_dtype: str = leaf("bfloat16", "encode stores them in", OneOf(CHOICES["moments_dtype"]))
    resolution: int | None = leaf(
        None, "images' side in pixels; unset: the model's", _SIDE, affects=RUN
    )
    prompt_dropout: float = leaf(
        0.2,
        "fraction with an empty prompt; editing: as many with no image",
        "[0, 1]",
        affects=RUN,
    )
    validation_fraction: float = leaf(
        0.01,
        "of the prompts, their pairs held out and never trained on",
        "[0, 1)",
        affects=RUN,
    )
    crop: str = leaf(
        "center",
        "of what is not square: center, or random, at a place drawn from the id",
        OneOf(CHOICES["crop"]),
    )
    ties: str = leaf(
        "keep",
        "pairs that nobody prefers: what encode does with them; with drop, training refuses a "
        "folder that holds any",
        OneOf(CHOICES["ties"]),
    )
    max_bad: float = leaf(0.01, "share of bad records that encode skips, at most", "[0, 1]")
    allow_outside: bool = leaf(
        False, "read images that lie outside the folder of the table that names them: trust it"
    )
    encode_batch: int = leaf(32, "pairs that encode takes at a time, on each host", "[1, inf)")
    num_threads: int = leaf(16, "that read and decode, on each host", "[1, inf)")
    prefetch: int = leaf(2, "batches made ready ahead of the step", "[0, inf)")


class Train(Section):
    steps: int = leaf(
        2000,
        "updates in all, those before a resume included",
        "[1, inf)",
        affects=BOTH,
        counts_with="optimizer.schedule",  # a decaying rate depends on it
    )
    batch_size: int = leaf(2048, "pairs an update, over all devices", "[1, inf)", affects=BOTH)
    accumulation: int = leaf(
        1,
        "microbatches an update is cut into, to save memory; auto, or 0, chooses the fewest that "
        "fit. Also of the run with lora.dropout, and without train.group with diffusion_kto, "
        "dspo_sdxl or safeguard.mu, which then work by microbatch",
        "[0, inf)",
        affects=PROGRAM,
        named={"auto": 0},
    )
    group: int | None = leaf(
        None,
        "consecutive pairs of a batch that its means are of (diffusion_kto's z0, dspo_sdxl's "
        "threshold, safeguard.mu's lambda), the same on any mesh: published scripts take the 8 of "
        "a device; unset: a whole microbatch",
        "[1, inf)",
        affects=BOTH,
        counts_with=ITSELF,
    )
    skip_limit: int = leaf(0, "updates with a non-finite loss to skip before giving up", "[0, inf)")
    hang_limit: int = leaf(
        1800, "seconds an update may take (thrice where it compiles); 0 any", "[0, inf)"
    )
    stop_on_alarm: bool = leaf(
        False, "save and stop when the curves raise an alarm; the same command then goes on"
    )
    ema_decay: float = leaf(
        0.0,
        "of a moving average of the weights, then exported; 0 keeps none",
        "[0, 1)",
        affects=BOTH,
        counts_with=ITSELF,
    )


class Lora(Section):
    rank: int = leaf(
        0,
        "width of low-rank adapters, alone trained; 0 trains every parameter",
        "[0, inf)",
        affects=BOTH,
        counts_with=ITSELF,
    )
    alpha: float | None = leaf(
        None,
        "their scale is alpha / rank; unset: rank, so 1",
        "(0, inf)",
        affects=BOTH,
        counts_with="lora.rank",
    )
    dropout: float = leaf(
        0.0,
        "fraction of the features that an adapter misses in training",
        "[0, 1)",
        affects=BOTH,
        counts_with="lora.rank",
    )
    targets: tuple[str, ...] = leaf(
        ("to_q", "to_k", "to_v", "to_out.0"),
        "ends of the paths of the layers adapted; also ff.net.0.proj, ff.net.2, conv1, conv2",
        Check(lambda x: bool(x) and _NAMES.fits(x), "ends of layers' paths"),
        affects=BOTH,
        counts_with="lora.rank",
    )


class Optimizer(Section):
    name: str = leaf("adamw", "largest state first", OneOf(OPTIMIZERS), affects=BOTH)
    learning_rate: float = leaf(
        2.048e-5,
        "peak, for the whole batch: published 1e-8 x 2048 pairs",
        "[0, inf)",
        affects=BOTH,
    )
    warmup_steps: int = leaf(500, "updates of linear warmup", "[0, inf)", affects=BOTH)
    schedule: str = leaf("constant", "after the warmup", OneOf(SCHEDULES), affects=BOTH)
    b1: float = leaf(0.9, "decay of the first moment (AdamW)", "[0, 1)", affects=BOTH)
    b2: float = leaf(0.999, "decay of the second moment (AdamW)", "[0, 1)", affects=BOTH)
    eps: float = leaf(
        1e-8, "added to the denominator (AdamW)", f"[{SMALLEST_EPS}, inf)", affects=BOTH
    )
    weight_decay: float = leaf(
        0.01, "times the learning rate, on every parameter", "[0, inf)", affects=BOTH
    )
    clip_norm: float = leaf(
        1.0, "largest global gradient norm; 0 does not clip", "[0, inf)", affects=BOTH
    )


class Mesh(Section):
    data: int = leaf(
        -1,
        "devices that share the batch only; -1: all that the others leave",
        _AXIS,
        affects=PROGRAM,
    )
    fsdp: int = leaf(
        1,
        "devices that share the batch, the parameters and the optimizer's state",
        _AXIS,
        affects=PROGRAM,
    )
    tensor: int = leaf(
        1,
        "devices that share one pair: the features of attention and resnets",
        _AXIS,
        affects=PROGRAM,
    )
    cpu_devices: int = leaf(
        1,
        "on a CPU alone: how many devices it is split into, say one a core",
        "[1, inf)",
        affects=PROGRAM,
    )


class Distributed(Section):
    coordinator: str = leaf("", "HOST:PORT of process 0; '': JAX_COORDINATOR_ADDRESS's")
    processes: int = leaf(
        0, "0: what JAX_NUM_PROCESSES or the cluster says; 1: no others", "[0, inf)"
    )
    process_id: int = leaf(
        -1,
        "which this is, from 0; -1: JAX_PROCESS_ID, or the cluster's",
        Check(lambda x: x >= -1, "-1, or a process's number"),
    )
    join_limit: int = leaf(300, "seconds for all processes to come together", "[1, inf)")
    heartbeat: int = leaf(
        100,
        "seconds of silence after which a process is dead, and all end",
        Check(lambda x: x >= 10, "at least 10: heartbeats are sent every few s"),
    )


class Log(Section):
    every: int = leaf(10, "updates between two lines of metrics", "[1, inf)")
    validate_every: int = leaf(200, "updates between two validations; 0 never", "[0, inf)")
    sample_every: int = leaf(500, "updates between two image grids; 0 never", "[0, inf)")
    checkpoint_every: int = leaf(200, "updates between two checkpoints", "[1, inf)")
    keep: int = leaf(
        3, "newest checkpoints kept; with 2 or more there is one to fall back on", "[1, inf)"
    )
    page: bool = leaf(True, "write WORKDIR/report/training.html, rewritten as training goes")
    tensorboard: bool = leaf(True, "write WORKDIR/tensorboard")
    wandb: str = leaf("", "Weights & Biases project; '' none")


class Sample(Section):
    steps: int = leaf(50, "sampler steps an image", "[1, inf)")
    guidance_scale: float = leaf(7.5, "classifier-free guidance; 1 is none", "[0, inf)")
    batch_size: int = leaf(8, "images at a time, over all devices", "[1, inf)")
    sampler: str = leaf(
        "auto", "auto is the one that the model's folder names", OneOf(("auto", *SAMPLERS))
    )
    images_per_prompt: int = leaf(1, "images of each prompt", "[1, inf)")
    negative_prompt: str | None = leaf(
        None,
        "what guidance leads away from, where a prompt names none itself; unset: what the "
        "pipeline takes",
    )
    image_guidance_scale: float = leaf(
        1.5, "of editing models: guidance by the given image; 1 is none", "[0, inf)"
    )
    height: int | None = leaf(None, "pixels; unset: the model's", "[8, inf)")
    width: int | None = leaf(None, "pixels; unset: the model's", "[8, inf)")
    vae_dtype: str | None = leaf(
        None, "of the VAE's computation; unset: model.compute_dtype", OneOf(DTYPES)
    )
    prompts: str = leaf("", "text file, one prompt a line; '' takes captions of the data")
    count: int = leaf(8, "prompts in an image grid", "[1, inf)")


class Collect(Section):
    prompts: str = leaf("", "text file, one prompt a line; '' takes sample.prompts")
    pairs: int = leaf(1024, "pairs to make; prompts take turns", f"[1, {EACH // 2}]")
    scorer: str = leaf(
        "",
        "what judges the two images: a name, KIND:FOLDER or PATH.py:FUNCTION; '' must be set for "
        "the collect job",
    )
    temperature: float | None = leaf(
        None,
        "Bradley-Terry: preference = sigmoid(score difference / this); unset: the scorer's own",
        "(0, inf)",
    )
    labels: str = leaf(
        "drawn", "drawn by that probability, or the probability itself", OneOf(LABELS)
    )
    tie_margin: float = leaf(
        0.0, "drawn: score differences below this are ties, preference 0.5", "[0, inf)"
    )


class Evaluate(Section):
    seeds: int = leaf(
        256,
        "held-out images of each model, at least: every prompt gets the same number",
        f"[1, {EACH}]",
    )
    images_per_prompt: int | None = leaf(
        None, "images of each prompt; unset: seeds by the number of prompts", f"[1, {EACH}]"
    )
    judges: tuple[str, ...] | None = leaf(
        None,
        "scorers, the primary one first; unset: collect.scorer",
        Check(_NAMES.fits, "names of scorers"),
    )
    estimand: str = leaf(
        "like_these",
        "what intervals are about: prompts like_these, a sample of many; or these, all there are",
        OneOf(ESTIMANDS),
    )
    noise: str = leaf(
        "own", "own of each image, or shared: one for all prompts", OneOf(("own", "shared"))
    )
    protocol: str = leaf("default", "settings of published evaluations, by name", OneOf(PROTOCOLS))
    single_file: bool = leaf(
        False, "also write the page as one file with the best and worst images inside"
    )


class Debug(Section):
    family: str = leaf(
        "",
        "a tiny random model and synthetic pairs, of this family; '' off",
        OneOf(lambda: ["", *(family.name for family in FAMILIES.values())]),
        affects=RUN,
    )


class Settings(Root):
    """A complete config, for a type checker."""

    objective: str = leaf("dmpo", "the loss", OneOf(OBJECTIVES), affects=BOTH)
    seed: int = leaf(
        0,
        "of the data's order, noise, timesteps, dropout and images",
        f"[0, {SEEDS})",
        affects=RUN,
    )
    jobs: tuple[str, ...] = leaf(("train",), f"what to do, in order; of {', '.join(JOBS)}")
    profile: str = leaf("", "START:STOP, the updates, both included, to trace into WORKDIR/profile")
    objectives: Objectives
    safeguard: Safeguard
    anchor: Anchor
    reference: Reference
    timesteps: Timesteps
    model: Model
    data: Data
    train: Train
    lora: Lora
    optimizer: Optimizer
    mesh: Mesh
    distributed: Distributed
    log: Log
    sample: Sample
    collect: Collect
    evaluate: Evaluate
    debug: Debug
