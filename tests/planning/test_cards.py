"""Descriptions of GPUs: every one parses, and says what XLA asks for."""

import re

import pytest

from dmpo_jax.planning import cards, chips

CARDS = cards.load_cards()
# Fields of XLA's GpuDeviceInfoProto without which it compiles for no card, or for another one.
NEEDED = """
    threads_per_block_limit threads_per_warp shared_memory_per_block shared_memory_per_core
    threads_per_core_limit core_count fpus_per_core block_dim_limit_x block_dim_limit_y
    block_dim_limit_z memory_bandwidth l2_cache_size clock_rate_ghz device_memory_size
    shared_memory_per_block_optin registers_per_core_limit registers_per_block_limit
""".split()


def test_the_cards_that_a_topology_names():
    assert set(CARDS) >= {"a100", "h100", "h200", "l40s"}


@pytest.mark.parametrize("name", CARDS)
def test_a_card(name):
    card = CARDS[name]
    assert chips.lookup(card.device_kind) == chips.CHIPS[card.name]
    title = cards.FOLDER.joinpath(f"{name}.toml").read_text().splitlines()[0]
    assert card.memory == 1e9 * int(re.search(r"(\d+) GB", title)[1])
    facts = card.compiler
    # The vector units at their highest clock: less than a tenth of the matrix units' rate or so.
    vector = 2 * facts.cores * facts.float32_units * facts.clock_ghz * 1e9
    assert 2 < card.flops / vector < 20
    assert facts.shared_memory_block == facts.shared_memory - 1024
    assert facts.threads % 32 == 0


@pytest.mark.parametrize("name", CARDS)
def test_every_fact_has_a_source(name):
    """[1] beside it, from the list at the head, or how to ask the card itself."""
    head, *facts = cards.FOLDER.joinpath(f"{name}.toml").read_text().split("\nname = ")
    listed = set(re.findall(r"^# \[(\d)\] \S", head, re.M))
    for line in facts[0].splitlines()[1:]:
        if not re.match(r"\w+ = [\d\"]", line) or line.startswith(("device_kind", "host")):
            continue
        cited = set(re.findall(r"\[(\d)\]", line))
        assert cited <= listed, line
        assert cited or "nvidia-smi" in line or "brief" in line, line


def test_the_target_of_a_card():
    text = cards.target_config(CARDS["h100"], cudnn=91200, cuda=13000)
    for field in NEEDED:
        assert re.search(rf"^  {field}: [\d.]+$", text, re.M), field
    assert "core_count: 132" in text
    assert "memory_bandwidth: 3350000000000" in text
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in text
    assert "dnn_version_info { major: 9 minor: 12 patch: 0 }" in text
    assert "runtime_version { major: 13 minor: 0 patch: 0 }" in text
    assert text.count("{") == text.count("}")
    assert "minor: 9 feature_extension: NONE" in cards.target_config(
        CARDS["l40s"], cudnn=91201, cuda=12090
    )


def test_facts_that_are_missing_or_unknown_are_refused():
    text = cards.FOLDER.joinpath("h100.toml").read_text()
    assert cards.parse_card(text) == CARDS["h100"]
    with pytest.raises(TypeError, match="bandwidth"):
        cards.parse_card(re.sub(r"^bandwidth.*$", "", text, flags=re.M))
    with pytest.raises(TypeError, match="colour"):
        cards.parse_card(text + "\ncolour = 3\n")
