"""Runs the jobs that a config names: for most, training: `dmpo-jax train`, in a clone.

python launch/train.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("train")
