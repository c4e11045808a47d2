"""Compiler options under which programs compile in a third of the time.

Every test runs under QUICK, processes that it starts included. QUICK rounds the policy's and the
reference's forward apart: what must be exactly zero asks for EXACT, or for the user's program.
"""

import os

import jax

QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
EXACT: dict[str, int | bool] = {}
if jax.__version_info__ < (0, 12):  # which has no other emitters
    QUICK["xla_cpu_use_fusion_emitters"] = False
    EXACT["xla_cpu_use_fusion_emitters"] = True
AS_USERS = {**EXACT, "xla_backend_optimization_level": 3}


def set_flags() -> None:
    """Sets QUICK for this process and its children; before the first computation."""
    flags = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
