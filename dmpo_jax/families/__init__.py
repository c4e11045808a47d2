"""Trainable pipelines: one `Family` record for each pipeline class."""

from dmpo_jax.errors import UserError
from dmpo_jax.families import flux2, sd3, sdxl, stable_diffusion, z_image
from dmpo_jax.families.editing import SD_EDIT, SD_INPAINT, SDXL_EDIT, SDXL_INPAINT
from dmpo_jax.families.family import Family, Published
from dmpo_jax.families.flux2 import KLEIN
from dmpo_jax.families.sd3 import SD3
from dmpo_jax.families.sdxl import SDXL
from dmpo_jax.families.stable_diffusion import SD
from dmpo_jax.families.z_image import Z_IMAGE

# Keyed by the pipeline class in model_index.json.
FAMILIES: dict[str, Family] = {}
PUBLISHED: dict[str, Published] = {
    **stable_diffusion.PUBLISHED,
    **sdxl.PUBLISHED,
    **sd3.PUBLISHED,
    **flux2.PUBLISHED,
    **z_image.PUBLISHED,
}


def register(family: Family) -> Family:
    """Registers a family under its pipeline class and returns it.

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
    """Returns the family with our short name; ValueError lists the known names."""
    for family in FAMILIES.values():
        if family.name == name:
            return family
    raise UserError(
        f"there is no family {name!r}; there are {', '.join(f.name for f in FAMILIES.values())}"
    )


for _family in (SD, SDXL, SD_EDIT, SDXL_EDIT, SD_INPAINT, SDXL_INPAINT, SD3, KLEIN, Z_IMAGE):
    register(_family)
