"""Runs `dmpo-jax plan` from a clone: compiles a config's training step without the chips.

python launch/plan.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("plan")
