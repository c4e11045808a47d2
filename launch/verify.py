"""Runs `dmpo-jax verify` from a clone: verifies a folder that a job has written.

python launch/verify.py FOLDER
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("verify")
