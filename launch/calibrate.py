"""Runs `dmpo-jax calibrate` from a clone: suggests a beta that fits a config's run.

python launch/calibrate.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("calibrate")
