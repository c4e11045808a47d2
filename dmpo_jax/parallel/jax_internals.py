"""JAX's private interfaces: to a job's processes, and to the CUDA libraries that it assumes.

All uses of JAX's private names are in this file. They can go when JAX
- tells which cluster started a process without starting its services (`jax.distributed.initialize`
  starts them for one process too, and in any pod it asks the Kubernetes API server);
- makes the coordinator's key-value store public, or ends all processes of a job when one ends
  with an error. Without it, a full disk on one process leaves the others waiting for JAX's
  heartbeat (100 s), which ends them with a status that asks for another run: 20 of them;
- asks the devices that a program is lowered for, not this machine, for their cuDNN.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from jax._src import clusters, distributed, lib


def find_cluster(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Returns (name, number of processes) of the cluster that started this process, or None."""
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.opt_in_only_method:
            continue
        # In any pod it would ask the API server, and warn or fail without permission.
        if kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in environ:
            continue
        if kind.is_env_present():
            return kind.__name__.removesuffix("Cluster"), kind.get_process_count()
    return None


def process_index() -> int:
    """Returns this process's index without starting the devices, unlike `jax.process_index`."""
    return distributed.global_state.process_id


def store() -> Any:
    """Returns the coordinator's key-value store.

    It is the only store that all processes share without a collective.
    """
    return distributed.global_state.client


def cuda_versions() -> dict[str, int] | None:
    """Returns the versions of cuDNN and CUDA that JAX's plugin was built with (91200, 13000).

    None without a plugin of JAX's own version.
    """
    versions = lib.cuda_versions
    if versions is None:
        return None
    return {
        "cudnn": versions.cudnn_build_version(),
        "cuda": versions.cuda_runtime_build_version(),
    }


@contextlib.contextmanager
def assumed_cudnn(version: int) -> Iterator[None]:
    """Within it, attention by cuDNN is traced as if this machine had that version of it."""
    from jax._src.cudnn import fused_attention_stablehlo  # here: training does without the name

    found = fused_attention_stablehlo.check_cudnn_version
    fused_attention_stablehlo.check_cudnn_version = lambda: version
    try:
        yield
    finally:
        fused_attention_stablehlo.check_cudnn_version = found
