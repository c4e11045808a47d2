"""Reads scheduler_config.json: the noise table and the sampler's settings."""

import dataclasses
import logging
from typing import Any

from etils import epath

from dmpo_jax.diffusers_io.folders import find_folder, one_line, read_json
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
FEW_STEPS = ("LCMScheduler", "TCDScheduler")  # no other sampler draws what these models learnt
MOST_TIMESTEPS = 100_000  # of a table; models are trained with 1,000
# Their noise matches no table here, so training with them would be wrong.
OTHER_NOISE = ("EDM", "FlowMatch", "FlowMap")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The sampler and its settings in a folder's scheduler_config.json.

    Keys that only a sampler reads are checked by `settings`, not before: training needs the
    noise table alone.

    overrides: settings that the pipeline class sets in place of the file's, or besides them.
    noise: kind of the folder's noise table.
    """

    file: epath.Path
    config: dict[str, Any]
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    noise: str = "ddpm"

    @property
    def scheduler(self) -> str:
        """The class that the file names, or "" if it names none."""
        return str(self.config.get("_class_name") or "")

    @property
    def name(self) -> str:
        """Name of the folder's own sampler, or of its stand-in."""
        return solver_of(self.scheduler, self.noise)[0].name

    def resolve(self, sampler: str = "auto") -> str:
        """Returns the sampler's name; auto is the folder's own, and a stand-in is logged.

        Raises:
            ValueError: as `check`.
        """
        self.check(sampler)
        if sampler != "auto":
            return sampler
        solver, own = solver_of(self.scheduler, self.noise)
        if not own:
            LOG.warning(
                "%s names %s; %s (deterministic) stands in. sample.sampler chooses another",
                self.file,
                self.scheduler or "no scheduler",
                solver.name,
            )
        return solver.name

    def check(self, sampler: str = "auto") -> None:
        """Raises UserError if auto would sample a few-step model as it was not trained to be."""
        if sampler == "auto" and self.scheduler in FEW_STEPS:
            names = [name for name, solver in SAMPLERS.items() if solver.noise == self.noise]
            raise UserError(
                f"{self.file} names {self.scheduler}, the sampler of a model distilled to few "
                f"steps, which this package does not have. Choose one of {', '.join(names)} with "
                "--config.sample.sampler: images will differ from those of its own sampler"
            )

    def settings(self, sampler: str, *, tokens: int | None = None) -> dict[str, Any]:
        """Returns keyword arguments of `samplers.<sampler>`.

        The folder's own sampler gets the file's settings. Another gets those of its class's
        `from_config`: keys that both know, and defaults for the rest.

        Args:
            tokens: of an image, for samplers whose levels depend on its size.

        Raises:
            ValueError: naming the key whose value the sampler does not support.
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
    """Loads the noise table and the sampling settings of a pipeline's scheduler_config.json.

    Raises:
        ValueError: the file is missing, its noise is not supported, or it differs from the
            noise that the pipeline class is trained with.
    """
    path = find_folder(folder)
    file = path / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MOST_TIMESTEPS:
        raise UserError(
            f"{file} has num_train_timesteps={steps!r}; supported: 1 to {MOST_TIMESTEPS}"
        )
    try:
        table = _make_table(config)
    except (TypeError, ValueError) as error:  # also of a value that is no number
        raise UserError(f"{file} describes no noise: {one_line(error)}") from error
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


def _make_table(config: dict[str, Any]) -> NoiseTable:
    name = str(config.get("_class_name"))
    if name == FLOW_EULER.scheduler:
        shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", 1.0)
        return make_flow_table(shift, config.get("num_train_timesteps", 1000))
    if name.startswith(OTHER_NOISE):
        own = sorted(solver.scheduler for solver in SAMPLERS.values())
        raise UserError(
            f"{name}, whose noise is not that of DDPM or of rectified flow as this "
            f"package reads it; supported: {own} and others of alphas_cumprod"
        )
    return make_ddpm_table(**{key: config[key] for key in DDPM_KEYS if key in config})
