"""Installation hints for optional dependencies, used in error messages."""

import importlib.metadata
import re

DISTRIBUTION = "dmpo_jax"


def install_hint(extra: str) -> str:
    """Returns the command that installs an extra of setup.py, such as "eval".

    It names the packages themselves, so it is correct wherever this package was installed from.
    """
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    marker = f"extra=={extra}"
    packages = [
        package.strip()
        for package, _, condition in (line.partition(";") for line in required)
        if re.sub(r"[ '\"]", "", condition) == marker
    ]
    if not packages:  # not installed, but imported from a clone
        return f"in a clone of this package, pip install -e '.[{extra}]'"
    return "pip install " + " ".join(f"'{package}'" for package in packages)
