"""Every leaf of a run's config once, with its default and its meaning. `config_checks` refuses
what cannot be run. Only `jobs` reads a config; all else takes plain arguments.

A file in configs/ starts from `defaults()`, changes a few leaves and returns it:

    def get_config(variant=""):
        config = defaults()
        config.model.folder = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        return config
"""

import copy
import difflib
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict, config_dict

# To a type checker every leaf of a ConfigDict is a union of all that could be one.
if TYPE_CHECKING:
    Config = Any
else:
    Config = ConfigDict

JOBS = ("collect", "encode", "train", "evaluate")
DTYPES = ("bfloat16", "float32")
MOMENTS, STORED = ("sample", "mean"), ("bfloat16", "float16", "float32")
# Equal to optim.OPTIMIZERS and optim.SCHEDULES, which lie a floor above; a test compares.
OPTIMIZERS = ("adamw", "adamw_bf16", "adafactor")
SCHEDULES = ("constant", "cosine", "linear")
LABELS = ("drawn", "probability")  # of collected pairs
# Equal to attention.KERNELS and execution.REMAT, likewise.
KERNELS = ("auto", "plain", "cudnn", "splash")
REMAT = ("none", "block", "transformer", "offload")
WEIGHTINGS = ("uniform", "min_snr")  # equal to noising.WEIGHTINGS
FAMILIES = ("sd", "sdxl", "sd_edit", "sdxl_edit", "sd_inpaint", "sdxl_inpaint")  # models.families

# dotted path: (default, what it means). A placeholder is unset and has a type.
LEAVES: dict[str, tuple[Any, str]] = {
    "objective": ("dmpo", "the loss: a name in objectives.OBJECTIVES"),
    "seed": (0, "of the data's order, noise, timesteps and prompt dropout"),
    "jobs": (("train",), f"what to do, in order; of {', '.join(JOBS)}"),
    "profile": ("", "START:STOP, the updates, both included, to trace into WORKDIR/profile"),
    # One subsection per objective: its hyperparameters, by their names as arguments.
    "objectives.dmpo.beta": (2000.0, "inverse temperature; as published for SD1.5 (SDXL: 6000)"),
    "objectives.dmpo.alpha": (
        0.01,
        "label noise, in (0, 0.5]: preferences are clipped to 1 - alpha",
    ),
    "objectives.diffusion_dpo.beta": (5000.0, "inverse temperature, as published"),
    "objectives.diffusion_dpo.label_smoothing": (
        0.0,
        "probability that a label is wrong, [0, 0.5)",
    ),
    "objectives.alpha_divergence.beta": (2000.0, "inverse temperature"),
    "objectives.alpha_divergence.alpha": (0.01, "label noise, in (0, 0.5]"),
    "objectives.alpha_divergence.order": (0.5, "in [0, 1]: 1 is dmpo, 0 diffusion_dpo smoothed"),
    "objectives.jensen_shannon.beta": (2000.0, "inverse temperature"),
    "objectives.jensen_shannon.alpha": (0.01, "label noise, in (0, 0.5]"),
    "objectives.ipo.beta": (2000.0, "the margin is drawn to 1 / (2 beta)"),
    "objectives.hinge.beta": (2000.0, "a margin of 1 / beta is wide enough"),
    "objectives.dspo.beta": (0.001, "of logit and discount; as published for SD1.5"),
    "objectives.diffusion_kto.beta": (1000.0, "of an image's gain, as in published code"),
    "objectives.diffusion_kto.chosen_weight": (1.0, "of chosen images"),
    "objectives.diffusion_kto.rejected_weight": (1.0, "of rejected images"),
    "objectives.mapo.beta": (0.1, "of the margin beside the chosen image's error, as published"),
    "objectives.sft": (ConfigDict(), "fine-tuning on the chosen images: nothing to set"),
    "safeguard.mu": (
        config_dict.placeholder(float),
        "in [0, 1]: the rejected image's gradient is held back where it undoes the chosen one's, "
        "leaving mu of its step (winner-preserving); unset: not",
    ),
    "timesteps.weighting": ("uniform", f"of the loss by timestep; one of {', '.join(WEIGHTINGS)}"),
    "timesteps.gamma": (5.0, "of min_snr: the signal-to-noise ratio at which weights are cut"),
    "timesteps.low": (0.0, "least noise trained on, as a fraction of the timesteps"),
    "timesteps.high": (1.0, "most noise trained on, likewise"),
    "model.folder": ("", "diffusers pipeline folder or hub id; '' must be set"),
    "model.variant": (
        "",
        "of the weight files: 'fp16' reads *.fp16.safetensors; '' reads the plain",
    ),
    "model.vae": ("", "another VAE's folder, such as SDXL's fp16 fix; '' takes the pipeline's"),
    "model.compute_dtype": ("bfloat16", "of activations; parameters are always float32"),
    "model.attention": (
        "auto",
        f"one of {', '.join(KERNELS)}; auto: cudnn on GPU, splash on TPU, else plain",
    ),
    "model.remat": (
        "none",
        "what a backward computes again, to save memory: none (kernels gathered over mesh.fsdp "
        "are kept too), block (resnets and spatial transformers), transformer (resnets and "
        "transformer blocks), offload (and what is kept goes to the host)",
    ),
    "model.scan": (False, "compile equal transformer blocks once, as a loop (SDXL has 70)"),
    "data.source": ("", "raw pairs, KIND:PATH, for the encode job; '' takes what collect made"),
    "data.encoded": ("", "folder of encoded pairs; '' is WORKDIR/encoded"),
    "data.mix": (
        config_dict.placeholder(tuple),
        "instead of data.encoded: several such folders, each FOLDER=WEIGHT, of the pairs",
    ),
    "data.flip": (False, "train on half of the pairs flipped; they must be stored flipped too"),
    "data.moments": ("sample", "what encode keeps of an image: sample (mean, variance) or mean"),
    "data.moments_dtype": ("bfloat16", f"encode stores them in; one of {', '.join(STORED)}"),
    "data.resolution": (config_dict.placeholder(int), "images' side in pixels; unset: the model's"),
    "data.prompt_dropout": (0.2, "fraction with an empty prompt; editing: as many with no image"),
    "data.validation_fraction": (0.01, "of the prompts, their pairs held out and never trained on"),
    "data.crop": (
        "center",
        "of what is not square: center, or random, at a place drawn from the id",
    ),
    "data.ties": ("keep", "pairs that nobody prefers: keep, or drop"),
    "data.max_bad": (0.01, "share of bad records that encode skips before it gives up"),
    "data.encode_batch": (32, "pairs that encode takes at a time, on each host"),
    "data.num_threads": (16, "that read and decode, on each host"),
    "data.prefetch": (2, "batches made ready ahead of the step"),
    "train.steps": (2000, "updates in all, those before a resume included"),
    "train.batch_size": (2048, "pairs an update, over all devices"),
    "train.accumulation": (1, "microbatches an update is cut into, to save memory"),
    "train.skip_limit": (0, "updates with a non-finite loss to skip before giving up"),
    "train.hang_limit": (1800, "seconds an update may take (thrice where it compiles); 0 any"),
    "train.ema_decay": (0.0, "of a moving average of the weights, then exported; 0 keeps none"),
    "lora.rank": (0, "width of low-rank adapters, alone trained; 0 trains every parameter"),
    "lora.alpha": (
        config_dict.placeholder(float),
        "their scale is alpha / rank; unset: rank, so 1",
    ),
    "lora.dropout": (0.0, "fraction of the features that an adapter misses in training"),
    "lora.targets": (
        ("to_q", "to_k", "to_v", "to_out.0"),
        "ends of the paths of the layers adapted; also ff.net.0.proj, ff.net.2, conv1, conv2",
    ),
    "optimizer.name": ("adamw", f"one of {', '.join(OPTIMIZERS)}, largest state first"),
    "optimizer.learning_rate": (2.048e-5, "peak, for the whole batch: published 1e-8 x 2048 pairs"),
    "optimizer.warmup_steps": (500, "updates of linear warmup"),
    "optimizer.schedule": ("constant", f"after the warmup; one of {', '.join(SCHEDULES)}"),
    "optimizer.b1": (0.9, "decay of the first moment (AdamW)"),
    "optimizer.b2": (0.999, "decay of the second moment (AdamW)"),
    "optimizer.eps": (1e-8, "added to the denominator (AdamW)"),
    "optimizer.weight_decay": (0.01, "times the learning rate, on every parameter"),
    "optimizer.clip_norm": (1.0, "largest global gradient norm; 0 does not clip"),
    "mesh.data": (-1, "devices that share the batch only; -1: all that the others leave"),
    "mesh.fsdp": (1, "devices that share the batch, the parameters and the optimizer's state"),
    "mesh.tensor": (1, "devices that share one pair: the features of attention and resnets"),
    "mesh.cpu_devices": (1, "on a CPU alone: how many devices it is split into, say one a core"),
    "distributed.coordinator": ("", "HOST:PORT of process 0; '': JAX_COORDINATOR_ADDRESS's"),
    "distributed.processes": (0, "0: what JAX_NUM_PROCESSES or the cluster says; 1: no others"),
    "distributed.process_id": (-1, "which this is, from 0; -1: JAX_PROCESS_ID, or the cluster's"),
    "distributed.join_limit": (300, "seconds for all processes to come together"),
    "distributed.heartbeat": (100, "seconds of silence after which a process is dead, and all end"),
    "log.every": (10, "updates between two lines of metrics"),
    "log.validate_every": (200, "updates between two validations; 0 never"),
    "log.sample_every": (500, "updates between two image grids; 0 never"),
    "log.checkpoint_every": (200, "updates between two checkpoints"),
    "log.keep": (3, "newest checkpoints kept; with 2 or more there is one to fall back on"),
    "log.tensorboard": (True, "write WORKDIR/tensorboard"),
    "log.wandb": ("", "Weights & Biases project; '' none"),
    "sample.steps": (50, "sampler steps an image"),
    "sample.guidance_scale": (7.5, "classifier-free guidance; 1 is none"),
    "sample.batch_size": (8, "images at a time, over all devices"),
    "sample.sampler": ("auto", "a name in samplers.SAMPLERS; auto: the folder's own"),
    "sample.images_per_prompt": (1, "images of each prompt"),
    "sample.negative_prompt": (
        config_dict.placeholder(str),
        "what guidance leads away from; unset: what the pipeline takes",
    ),
    "sample.image_guidance_scale": (
        1.5,
        "of editing models: guidance by the given image; 1 is none",
    ),
    "sample.height": (config_dict.placeholder(int), "pixels; unset: the model's"),
    "sample.width": (config_dict.placeholder(int), "pixels; unset: the model's"),
    "sample.prompts": ("", "text file, one prompt a line; '' takes captions of the data"),
    "sample.count": (8, "prompts in an image grid"),
    "collect.prompts": ("", "text file, one prompt a line; '' takes sample.prompts"),
    "collect.pairs": (1024, "pairs to make"),
    "collect.scorer": ("", "what judges the two images; '' must be set for the collect job"),
    "collect.temperature": (1.0, "Bradley-Terry: preference = sigmoid(score difference / this)"),
    "collect.labels": (
        "drawn",
        "drawn by that probability, or the probability itself",
    ),
    "collect.tie_margin": (0.0, "drawn: score differences below this are ties, preference 0.5"),
    "evaluate.seeds": (256, "held-out images a judge sees of each model"),
    "evaluate.judges": (config_dict.placeholder(tuple), "names of scorers; unset: collect.scorer"),
    "debug.family": (
        "",
        f"a tiny random model and synthetic pairs; one of {', '.join(FAMILIES)}; '' off",
    ),
}


def defaults() -> Config:
    """A new config with every leaf at its default; locked, so that a misspelt one raises."""
    config = ConfigDict()
    for path, (default, _) in LEAVES.items():
        *sections, name = path.split(".")
        section: Any = config
        for part in sections:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        # Each config its own: placeholders and empty sections are objects that can change.
        section[name] = copy.deepcopy(default)
    return config.lock()


def debug(config: Config, family: str) -> Config:
    """The same run at tiny width: random weights, synthetic pairs, three steps, no files."""
    config.debug.family = family
    config.train.steps, config.train.batch_size = 3, 16
    config.data.validation_fraction, config.data.num_threads = 0.25, 2
    config.log.every = config.log.validate_every = 1
    config.log.sample_every = config.log.checkpoint_every = 3
    config.sample.steps, config.sample.count = 4, 2
    return config


def leaves(config: Config) -> dict[str, Any]:
    """{dotted path: value} of every leaf; empty sections have none, unset leaves are None."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{path}": leaf for path, leaf in leaves(value).items()}
        else:
            flat[name] = value
    return flat


def from_leaves(values: dict[str, Any]) -> Config:
    """The inverse of `leaves`, also after a round trip through JSON.

    Raises:
        ValueError: naming a leaf that this version does not have.
    """
    config = defaults()
    for path, value in values.items():
        *sections, name = path.split(".")
        section: Any = config
        try:
            for part in sections:
                section = section[part]
            section[name] = tuple(value) if isinstance(value, list) else value
        except (KeyError, AttributeError) as error:
            raise ValueError(f"config leaf {path!r} is unknown to this version") from error
    return config


def describe(config: Config | None = None) -> str:
    """One line a leaf: its path, value (the default where no config is given) and meaning."""
    flat, lines, last = leaves(defaults() if config is None else config), [], None
    # In the table's order, which goes from what everyone sets to what few do.
    for path in sorted(flat, key=lambda p: list(LEAVES).index(p) if p in LEAVES else len(LEAVES)):
        section = path.rpartition(".")[0]
        if lines and section != last:
            lines.append("")
        last = section
        shown = "unset" if flat[path] is None else repr(flat[path])
        lines.append(f"{path + '=' + shown:<46}{LEAVES.get(path, ('', ''))[1]}".rstrip())
    return "\n".join(lines)


def nearest(path: str, known: list[str]) -> str:
    """The known dotted path that `path` most likely meant."""

    def ratio(a, b):
        return difflib.SequenceMatcher(None, a, b).ratio()

    def last(p):
        return p.rpartition(".")[2]

    # The last part counts by itself: people forget sections more often than names.
    return max(known, key=lambda k: ratio(path, k) + ratio(last(path), last(k)))


def identity(config: Config) -> dict[str, Any]:
    """What a run's checkpoints may not outlive a change of, as JSON can hold it.

    Left out is all that changes rounding at most (mesh, accumulation, threads), how long
    or how chattily the run goes on (train.steps, log, sample), and the other jobs. Where
    the learning rate decays towards train.steps, that is part of it.
    """

    def pick(section, names):
        return {name: section[name] for name in names.split()}

    found = {
        "objective": config.objective,
        "objectives": {config.objective: config.objectives[config.objective].to_dict()},
        "seed": config.seed,
        "model": pick(config.model, "folder variant compute_dtype"),
        "data": pick(config.data, "source encoded resolution prompt_dropout validation_fraction"),
        "train": pick(config.train, "batch_size"),
        "optimizer": config.optimizer.to_dict(),
        "debug": pick(config.debug, "family"),
    }
    if config.safeguard.mu is not None:
        found["safeguard"] = config.safeguard.to_dict()
    if config.timesteps.weighting != "uniform":
        found["timesteps"] = config.timesteps.to_dict()
    elif (config.timesteps.low, config.timesteps.high) != (0, 1):
        found["timesteps"] = pick(config.timesteps, "low high")
    if config.data.mix:
        found["data"]["mix"] = list(config.data.mix)
    if config.data.flip:
        found["data"]["flip"] = True
    if config.optimizer.schedule != "constant":
        found["train"]["steps"] = config.train.steps
    if config.train.ema_decay:
        found["train"]["ema_decay"] = config.train.ema_decay
    if config.lora.rank:
        found["lora"] = config.lora.to_dict()
    return found
