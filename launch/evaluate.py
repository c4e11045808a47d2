"""Runs `dmpo-jax evaluate` from a clone: compares two models.

python launch/evaluate.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("evaluate")
