"""Compiler options under which programs compile in a third of the time."""

import jax

# They round differently: not for what must be exactly zero.
QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 12):  # which has no other emitters
    QUICK["xla_cpu_use_fusion_emitters"] = False
