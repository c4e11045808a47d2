"""Messages of libraries that look like errors and are none: they are not shown."""

import os
import pathlib
import subprocess
import sys

from dmpo_jax.toy.digits import PIPELINE

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import importlib.util, sys

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
from dmpo_jax import diffusers_io

pipeline = diffusers_io.load_pipeline(sys.argv[1])
list(diffusers_io.embed_prompts(pipeline, ["a handwritten two " * 50]))
"""


def test_tokenizers_advise_nothing_where_torch_is_absent_and_a_prompt_is_long():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(PIPELINE)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "1 of 1 prompts are longer than the tokenizer takes and were cut" in done.stderr
    for noise in ("PyTorch was not found", "indexing errors"):
        assert noise not in done.stderr
