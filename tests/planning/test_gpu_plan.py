"""Plans of a small step by XLA's GPU compiler, where its package is installed; no GPU is needed."""

import dataclasses
import importlib.util

import pytest

from dmpo_jax.config import configs, step_settings
from dmpo_jax.planning import plan as planning
from dmpo_jax.planning import step, topologies
from dmpo_jax.planning.cards import load_cards
from dmpo_jax.toy import debug
from tests.support import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(name) for name in topologies.PLUGINS),
        reason="the extra [plan-gpu] is not installed",
    ),
]
# One level, so that it compiles in a minute or two; heads of 16, which cuDNN takes.
FAMILY = dataclasses.replace(
    tiny.FAMILY,
    tiny=tiny.FAMILY.tiny._replace(model={**tiny.FAMILY.tiny.model, "block_out_channels": [32]}),
)


def planned_on(topology):
    config = configs.defaults()
    config.data.resolution, config.train.batch_size = 64, 4
    config.model.compute_dtype = "bfloat16"
    model = step.of_published(debug.published(FAMILY), "small", resolution=64)
    return planning.plan_one(
        model,
        step_settings.read_step(config),
        step_settings.mesh_axes(config),
        topology,
        steps=100,
    )


@pytest.fixture(scope="module")
def texts():
    return {}


@pytest.fixture(scope="module")
def plans(texts):
    """The step on one card and on two. Their texts are kept: a plan holds numbers alone."""
    described = planning.describe

    def keep(planned, program, *args, **rest):
        texts[planned.built.mesh.size] = program.as_text()
        return described(planned, program, *args, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "describe", keep)
        return {count: planned_on(f"h100:{count}") for count in (1, 2)}


@pytest.mark.parametrize("name", load_cards())
def test_xla_takes_every_description(name):
    (device,) = topologies.open_devices(f"{name}:1")
    card = load_cards()[name]
    assert device.device_kind == card.device_kind
    assert device.platform == "gpu"
    both = topologies.open_devices(f"{name}:2")
    assert len(both) == 2
    if card.network is not None:
        sixteen = topologies.open_devices(f"{name}:16")
        assert [one.process_index for one in sixteen] == [0] * 8 + [1] * 8


def test_one_card(plans, texts):
    plan = plans[1]
    memory, parts = plan["memory"], plan["memory"]["parts"]
    told = ("params", "optimizer", "ema", "reference", "batch")
    assert memory["arguments"] == pytest.approx(sum(parts[name] for name in told), rel=0.01)
    assert parts["gradients"] == parts["params"]
    assert memory["temporaries"] > parts["gradients"]
    assert memory["fits"] is True
    assert plan["device_kind"] == "NVIDIA H100 80GB HBM3"
    assert plan["collectives"] == []
    assert plan["time"]["memory"] == plan["xla"]["traffic_with_loops"] / 3350e9 > 0
    assert plan["bound_by"] == "memory"
    assert any("workspaces" in note for note in plan["notes"])
    # Attention by cuDNN's kernels, self and cross, with 77 tokens in the latter.
    assert texts[1].count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') > 0
    # Two products of six are made again in its backward, of all the step's a few percent.
    assert plan["flops"]["chip_executed"] == pytest.approx(plan["flops"]["chip"], rel=0.1)


def test_a_second_card_adds_the_gradients_reduction_alone(plans):
    one, two = plans[1], plans[2]
    parts = two["memory"]["parts"]
    assert parts["params"] == one["memory"]["parts"]["params"]  # replicated
    assert parts["batch"] == pytest.approx(one["memory"]["parts"]["batch"] / 2, rel=0.01)
    assert two["flops"]["chip_executed"] == pytest.approx(one["flops"]["chip_executed"] / 2)
    moved = {(row["kind"], row["moves"]): row["payload_bytes"] for row in two["collectives"]}
    assert {moves for _, moves in moved} == {"parameters", "scalars"}
    # Equal gradients, of biases that are added together, are reduced once.
    assert moved["all-reduce", "parameters"] == pytest.approx(parts["gradients"], rel=0.01)
    assert not any(kind == "all-gather" for kind, moves in moved if moves == "parameters")
