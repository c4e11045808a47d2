"""Compares two models: `dmpo-jax evaluate`, in a clone.

python launch/evaluate.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("evaluate")
