"""scheduler_config.json: the noise table, and how the folder is meant to be sampled."""

import dataclasses
import logging
from typing import Any

from etils import epath

from dmpo_jax.diffusers_io.folders import find_folder, read_json
from dmpo_jax.diffusion.flow_euler import FLOW_EULER
from dmpo_jax.diffusion.noise import NoiseTable, make_ddpm_table, make_flow_table
from dmpo_jax.diffusion.samplers import SAMPLERS, solver_of
from dmpo_jax.errors import UserError
from dmpo_jax.families import FAMILIES

LOG = logging.getLogger(__name__)

DDPM_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "rescale_betas_zero_snr",
    "trained_betas",
)
# These noise images in another way than any table here says: training on them would be wrong.
OTHER_NOISE = ("EDM", "FlowMatch", "FlowMap")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a folder is meant to be sampled, as its scheduler_config.json says.

    Nothing that only a sampler reads is checked before `settings` is asked for: training
    needs the noise table alone.

    overrides: settings that the pipeline class puts in place of the file's, or gives beside
    them. noise: kind of the folder's noise table.
    """

    file: epath.Path
    config: dict[str, Any]
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    noise: str = "ddpm"

    @property
    def scheduler(self) -> str:
        """The class that the file names, or "" where it names none."""
        return str(self.config.get("_class_name") or "")

    @property
    def name(self) -> str:
        """The folder's own sampler, or what stands in for it."""
        return solver_of(self.scheduler, self.noise)[0].name

    def resolve(self, sampler: str = "auto") -> str:
        """The sampler's name; auto is the folder's own, and a stand-in is logged."""
        if sampler != "auto":
            return sampler
        solver, own = solver_of(self.scheduler, self.noise)
        if not own:
            LOG.warning(
                "%s names %s; %s (deterministic) stands in",
                self.file,
                self.scheduler or "no scheduler",
                solver.name,
            )
        return solver.name

    def settings(self, sampler: str, *, tokens: int | None = None) -> dict[str, Any]:
        """Keyword arguments of `samplers.<sampler>`.

        Those of the folder's own sampler, or for another what its class's `from_config`
        makes of the config: keys that both know, and defaults for the rest.

        Args:
            tokens: of an image, for samplers whose levels depend on its size.

        Raises:
            ValueError: naming the key whose value would change what the sampler does.
        """
        legal = sorted(name for name, solver in SAMPLERS.items() if solver.noise == self.noise)
        if sampler not in legal:
            raise UserError(f"sampler must be auto or one of {legal}, got {sampler!r}")
        solver = SAMPLERS[sampler]
        try:
            settings = solver.read(self.config)
        except UserError as error:
            raise UserError(
                f"{self.file} asks for {error}; choose another sampler, or change the file"
            ) from error
        own = self.scheduler == solver.scheduler
        for key, value in self.overrides.items():
            if key in solver.given or (key in settings and (own or key in self.config)):
                settings[key] = value
        return settings | ({"tokens": tokens} if "tokens" in solver.given else {})


def load_schedule(folder: epath.PathLike) -> tuple[NoiseTable, Sampling]:
    """The noise table of a pipeline's scheduler_config.json, and how it says to sample.

    Raises:
        ValueError: the file is missing, noises images in another way, or in another one than
            the pipeline class is trained with.
    """
    path = find_folder(folder)
    file = path / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    table = _make_table(file, config)
    index = path / "model_index.json"
    kind = str(read_json(index).get("_class_name")) if index.exists() else ""
    family = FAMILIES.get(kind)
    if family is not None and family.noise != table.kind:
        raise UserError(
            f"{file} names {config.get('_class_name')}, whose noise is of kind {table.kind!r}, but "
            f"{kind} models are trained with {family.noise!r}: take the scheduler from the "
            "model's own pipeline"
        )
    overrides = dict(family.scheduler_overrides) if family else {}
    return table, Sampling(file, config, overrides, table.kind)


def _make_table(file: epath.Path, config: dict[str, Any]) -> NoiseTable:
    name = str(config.get("_class_name"))
    if name == FLOW_EULER.scheduler:
        shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", 1.0)
        return make_flow_table(shift, config.get("num_train_timesteps", 1000))
    if name.startswith(OTHER_NOISE):
        own = sorted(solver.scheduler for solver in SAMPLERS.values())
        raise UserError(
            f"{file} names {name}, whose noise is not that of DDPM or of rectified flow as this "
            f"package reads it; supported: {own} and others of alphas_cumprod"
        )
    return make_ddpm_table(**{key: config[key] for key in DDPM_KEYS if key in config})
