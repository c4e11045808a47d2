"""How optional dependencies are installed, in words for error messages."""

import importlib.metadata

DISTRIBUTION = "dmpo_jax"


def install_hint(extra: str) -> str:
    """The command that installs the packages of an extra of setup.py, such as "eval".

    It names the packages themselves, so that it is right wherever this package came from.
    """
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    marker = f"extra=={extra}"
    packages = [
        package.strip()
        for package, _, condition in (line.partition(";") for line in required)
        if condition.replace(" ", "").replace('"', "").replace("'", "") == marker
    ]
    if not packages:  # not installed, but imported from a clone
        return f"in a clone of this package, pip install -e '.[{extra}]'"
    return "pip install " + " ".join(f"'{package}'" for package in packages)
