"""Compiles a config's training step for chips that need not be there: `dmpo-jax plan`, in a clone.

python launch/plan.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("plan")
