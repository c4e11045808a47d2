"""scheduler_config.json: the noise schedule, and how the folder is meant to be sampled."""

import dataclasses
import logging
from typing import Any

from etils import epath

from dmpo_jax.diffusers_io.folders import find_folder, read_json
from dmpo_jax.diffusion.noise import NoiseSchedule, make_noise_schedule
from dmpo_jax.families import FAMILIES

LOG = logging.getLogger(__name__)

SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "rescale_betas_zero_snr",
    "trained_betas",
)
# Scheduler class -> the sampler that is it.
OWN = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
STAND_INS = {"EulerAncestralDiscreteScheduler": "euler"}  # DDIM for all others
# These noise images in another way than alphas_cumprod says: training on them would be wrong.
OTHER_NOISE = ("EDM", "FlowMatch", "FlowMap")
# A sampler's keyword arguments, each with what its diffusers class takes where the config has
# none. DDIM's own clip_sample is True, which no latents survive: pipelines turn it off on loading.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ddim": {
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "clip_sample_range": 1.0,
    },
    "euler": {
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "use_karras_sigmas": False,
        "final_sigmas_type": "zero",
    },
    "dpmpp_2m": {
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "use_karras_sigmas": False,
        "final_sigmas_type": "zero",
        "solver_order": 2,
        "lower_order_final": True,
        "euler_at_final": False,
    },
}
# Keys that change what a sampler does and are supported at these values alone; the first is what
# its class takes where the config has none.
_SIGMAS = {"use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None)}
ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "ddim": {"thresholding": (False, None)},
    "euler": {**_SIGMAS, "interpolation_type": ("linear",), "timestep_type": ("discrete",)},
    "dpmpp_2m": {
        **_SIGMAS,
        "thresholding": (False, None),
        "solver_order": (2, 1),
        "algorithm_type": ("dpmsolver++", "deis"),  # diffusers, too, reads DEIS's as its own
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # likewise
        "lambda_min_clipped": (float("-inf"), None),
        "use_lu_lambdas": (False, None),
        "use_flow_sigmas": (False, None),
    },
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a folder is meant to be sampled, as its scheduler_config.json says.

    Nothing that only a sampler reads is checked before `settings` is asked for: training
    needs the noise schedule alone.
    """

    file: epath.Path
    config: dict[str, Any]
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def scheduler(self) -> str:
        """The class that the file names, or "" where it names none."""
        return str(self.config.get("_class_name") or "")

    @property
    def name(self) -> str:
        """The folder's own sampler, or what stands in for it."""
        return OWN.get(self.scheduler) or STAND_INS.get(self.scheduler, "ddim")

    def resolve(self, sampler: str = "auto") -> str:
        """The sampler's name; auto is the folder's own, and a stand-in is logged."""
        if sampler != "auto":
            return sampler
        if self.scheduler not in OWN:
            LOG.warning(
                "%s names %s; %s (deterministic) stands in",
                self.file,
                self.scheduler or "no scheduler",
                self.name,
            )
        return self.name

    def settings(self, sampler: str) -> dict[str, Any]:
        """Keyword arguments of `samplers.<sampler>`.

        Those of the folder's own sampler, or for another what its class's `from_config`
        makes of the config: keys that both know, and defaults for the rest.

        Raises:
            ValueError: naming the key whose value would change what the sampler does.
        """
        if sampler not in DEFAULTS:
            raise ValueError(f"sampler must be auto or one of {sorted(DEFAULTS)}, got {sampler!r}")
        only = dict(ONLY[sampler])
        if sampler == "euler" and self.config.get("prediction_type") != "v_prediction":
            del only["timestep_type"]  # continuous ones are for v alone
        if sampler == "euler" and self.config.get("use_karras_sigmas"):
            only |= {"sigma_min": (None,), "sigma_max": (None,)}
        for key, supported in only.items():
            value = self.config.get(key, supported[0])
            if value not in supported:
                raise ValueError(
                    f"{self.file} asks for {key}={value!r}, but {sampler} supports only "
                    f"{supported[0]!r}; choose another sampler, or change the file"
                )
        settings = {
            key: self.config.get(key, default) for key, default in DEFAULTS[sampler].items()
        }
        own = OWN.get(self.scheduler) == sampler
        for key in settings.keys() & self.overrides.keys():
            if own or key in self.config:
                settings[key] = self.overrides[key]
        return settings


def load_schedule(folder: epath.PathLike) -> tuple[NoiseSchedule, Sampling]:
    """The noise schedule of a pipeline's scheduler_config.json, and how it says to sample.

    Raises:
        ValueError: the file is missing, or noises images in another way.
    """
    path = find_folder(folder)
    file = path / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    if str(config.get("_class_name")).startswith(OTHER_NOISE):
        raise ValueError(
            f"{file} names {config['_class_name']}, whose noise is not that of DDPM; supported: "
            f"{sorted(OWN)} and others of alphas_cumprod"
        )
    given = {key: config[key] for key in SCHEDULE_KEYS if key in config}
    index = path / "model_index.json"
    kind = read_json(index).get("_class_name") if index.exists() else None
    family = FAMILIES.get(str(kind))
    overrides = dict(family.scheduler_overrides) if family else {}
    return make_noise_schedule(**given), Sampling(file, config, overrides)
