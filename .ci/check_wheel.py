"""Checks a wheel's content: the package's tracked files, the configs, and nothing else.

python .ci/check_wheel.py WHEEL TRACKED

TRACKED is what `git ls-files -z dmpo_jax configs` prints.
"""

import pathlib
import sys
import zipfile


def main(wheel: str, tracked: str) -> None:
    names = pathlib.Path(tracked).read_text("utf-8").split("\0")
    wanted = {name for name in names if name.startswith("dmpo_jax/")}
    wanted |= {f"dmpo_jax/{n}" for n in names if n.startswith("configs/") and n.endswith(".py")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if held != wanted:
        sys.exit(
            f"{wheel} lacks {sorted(wanted - held) or 'nothing'} and should not hold "
            f"{sorted(held - wanted) or 'nothing'}: see package_data in setup.py"
        )
    print(f"{pathlib.Path(wheel).name}: {len(held)} files, as tracked")


if __name__ == "__main__":
    main(*sys.argv[1:])
