"""Runs `dmpo-jax train` from a clone: runs the jobs that a config names, usually training.

python launch/train.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("train")
