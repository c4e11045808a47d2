"""Descriptions of the leaves, for --help and for the page docs/config_reference.md.

python -m dmpo_jax.config.reference > docs/config_reference.md
"""

from typing import Any

from dmpo_jax.config.configs import Config, declared, defaults, flatten

_INTRODUCTION = """# Config reference

Every option, with its default. Set one in a config file (`config.train.steps = 500`) or on the
command line of any command (`--config.train.steps=500`). Options that affect *run* must stay as
they are to resume a run; options that affect *program* change the compiled step.

This page is made from `dmpo_jax/config/sections.py` and from the objectives' decorators:
`python -m dmpo_jax.config.reference > docs/config_reference.md`.
"""


def describe(config: Config | None = None) -> str:
    """Returns one line per leaf: path, value (the default if no config is given) and meaning."""
    flat, known = flatten(defaults() if config is None else config), declared()
    lines, last = [], None
    # In the order of declaration: commonly set leaves first.
    for path in [*(p for p in known if p in flat), *(p for p in flat if p not in known)]:
        section = path.rpartition(".")[0]
        if lines and section != last:
            lines.append("")
        last = section
        text = ""
        if path in known:
            text = "; ".join(filter(None, (known[path].meaning, known[path].words)))
        lines.append(f"{path + '=' + _shown(flat[path]):<45} {text}".rstrip())
    return "\n".join(lines)


def render() -> str:
    """Returns the reference page as Markdown, one table per section."""
    parts, last = [_INTRODUCTION], None
    for path, leaf in declared().items():
        section, _, name = path.rpartition(".")
        if section != last:
            parts.append(f"\n## {section or 'The run'}\n")
            parts.append("| option | default | meaning | values | affects |\n|---|---|---|---|---|")
        last = section
        kind = "names with commas between" if leaf.kind is tuple else leaf.kind.__name__
        affects = leaf.affects.replace(" ", ", ")
        cells = (name, f"`{_shown(leaf.default)}`", leaf.meaning, leaf.words or kind, affects)
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return "unset" if value is None else repr(value)


if __name__ == "__main__":
    print(render(), end="")
