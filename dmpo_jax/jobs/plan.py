"""Plans a config's training step for chips that may be absent."""

import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from dmpo_jax import storage
from dmpo_jax.config import step_settings
from dmpo_jax.config.configs import Config
from dmpo_jax.families import PUBLISHED, family_named
from dmpo_jax.planning import plan as planning
from dmpo_jax.planning import step
from dmpo_jax.planning.topologies import is_slice
from dmpo_jax.toy import debug
from dmpo_jax.toy import make as toy


def plan(
    config: Config,
    topologies: Sequence[str],
    *,
    published: str = "",
    out: epath.PathLike = "",
    cache: epath.PathLike = "",
) -> list[dict[str, Any]]:
    """Returns a plan for each topology, from `planning.plan.plan`.

    Args:
        config: of a run; only the shapes of its weights and data are read.
        published: a name in PUBLISHED, in place of model.folder.
        out: a file for the plans, as JSON. cache: see `planning.plan.plan`.

    Raises:
        ValueError: a topology is not available here, or the config does not fit it.
    """
    plans = planning.plan(
        load_model(config, published),
        step_settings.read_step(config),
        step_settings.mesh_axes(config),
        topologies,
        steps=config.train.steps,
        cache=cache,
    )
    if out:
        epath.Path(out).parent.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(out, (json.dumps(plans, indent=1) + "\n").encode())
    return plans


def load_model(config: Config, published: str = "") -> step.Model:
    """Returns the shapes of the model that a config names, or of a published one."""
    pairs = {name: config.data[name] for name in ("resolution", "moments", "moments_dtype")}
    if published:
        return step.of_published(PUBLISHED[published], published, **pairs)
    if name := config.debug.family:
        made = debug.published(family_named(name))
        pairs["resolution"] = pairs["resolution"] or toy.UNET["sample_size"] * made.factor
        return step.of_published(made, f"debug {name}", **pairs)
    return step.of_folder(config.model.folder, encoded=config.data.encoded, **pairs)


def prepare_process(topologies: Sequence[str]) -> None:
    """Sets up this process for planning; must be called before JAX is initialised.

    JAX then does not search for a TPU if only its compiler is needed, nor for a GPU if no plan
    needs one. It has as many CPU devices as the topologies request.
    """
    counts: dict[str, str] = {}
    for topology in topologies:
        platform, _, count = topology.partition(":")
        counts[platform] = count
    if any(map(is_slice, topologies)):
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if "gpu" not in counts and not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")
    if counts.get("cpu", "").isdigit():
        with contextlib.suppress(RuntimeError):  # JAX is already initialised
            jax.config.update("jax_num_cpu_devices", int(counts["cpu"]))
