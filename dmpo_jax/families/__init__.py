"""The pipelines that can be trained, one record each."""

from dmpo_jax.errors import UserError
from dmpo_jax.families import sdxl, stable_diffusion
from dmpo_jax.families.editing import SD_EDIT, SD_INPAINT, SDXL_EDIT, SDXL_INPAINT
from dmpo_jax.families.family import Family, Published
from dmpo_jax.families.sdxl import SDXL
from dmpo_jax.families.stable_diffusion import SD

# By the class that model_index.json names.
FAMILIES: dict[str, Family] = {}
PUBLISHED: dict[str, Published] = {**stable_diffusion.PUBLISHED, **sdxl.PUBLISHED}


def register(family: Family) -> Family:
    """Makes a family known, under its pipeline class; returns it.

    Raises:
        ValueError: another family has its name or its pipeline class.
    """
    for other in FAMILIES.values():
        if (other.name == family.name) != (other.pipeline == family.pipeline):
            raise UserError(
                f"the family {family.name} ({family.pipeline}) must have a name and a pipeline "
                f"class of its own, but {other.name} ({other.pipeline}) is there"
            )
    FAMILIES[family.pipeline] = family
    return family


def family_named(name: str) -> Family:
    """The family of our short name; ValueError listing them."""
    for family in FAMILIES.values():
        if family.name == name:
            return family
    raise UserError(
        f"there is no family {name!r}; there are {', '.join(f.name for f in FAMILIES.values())}"
    )


for _family in (SD, SDXL, SD_EDIT, SDXL_EDIT, SD_INPAINT, SDXL_INPAINT):
    register(_family)
