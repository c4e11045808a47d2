"""The lines of a training loop: what its hooks measured."""

import contextlib
import io
import logging
import types
from typing import Any

import rich.console

from dmpo_jax.progress import Progress
from dmpo_jax.training.hooks import Hook
from dmpo_jax.training.loop import call


class Validation(Hook):
    name = "validation"

    def __call__(self, state, update):
        return {"validation_loss": 0.51234, "validation_implicit_accuracy": 0.75}


def test_what_a_hook_measures_is_shown(caplog):
    written = []
    watch: Any = types.SimpleNamespace(timed=lambda name: contextlib.nullcontext())
    writer: Any = types.SimpleNamespace(write=lambda *line: written.append(line))
    out = rich.console.Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO), Progress(8, console=out) as progress:
        state: Any = None
        call([Validation()], state, 4, watch, writer, progress)
    assert caplog.messages == ["step 4: validation loss 0.5123, validation implicit accuracy 0.75"]
    assert [step for step, _ in written] == [4]
