"""Order in memory of convolution kernels, where the compiler's own kernels want another one.

cuDNN reads a kernel, and writes its gradient, with the output features outermost: OHWI. Our
kernels are HWIO. With parameters, moments and reference held in HWIO order, a GPU's step
transposes each of them, every update. The arrays keep their shapes here, and so do files and
checkpoints: only the order of the bytes on the device changes.
"""

from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from dmpo_jax.parallel import meshes

PLATFORMS = ("gpu",)
OHWI = Layout(major_to_minor=(3, 0, 1, 2))  # of an array whose axes are HWIO


def parameter_formats(mesh: Mesh, params: Any) -> Any:
    """Returns `meshes.parameter_sharding`, with the order in memory of convolution kernels.

    Args:
        params: any pytree of arrays or ShapeDtypeStructs, its leaves under the dotted paths of
            parameters: parameters, optimizer state, moving averages.

    Returns:
        For each leaf a NamedSharding, which leaves the order to the compiler, or a Format.
    """
    shardings = meshes.parameter_sharding(mesh, params)
    if mesh.devices.flat[0].platform not in PLATFORMS:
        return shardings

    def held(path: tuple, leaf: Any, sharding: Any) -> Any:
        names = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
        kernel = bool(names) and names[-1].endswith(".kernel") and leaf.ndim == 4
        return Format(OHWI, sharding) if kernel else sharding

    return jax.tree_util.tree_map_with_path(held, params, shardings)


def arrange(params: Any, mesh: Mesh, *, donate: bool = False) -> Any:
    """Returns arrays in the order of `parameter_formats`; their shardings stay.

    donate: deletes each array that another replaces, as soon as it does: a state need not fit
        twice.
    """

    def put(array: Any, wanted: Any) -> Any:
        if not isinstance(wanted, Format) or _is_ohwi(array):
            return array
        arranged = jax.device_put(array, Format(OHWI, array.sharding))
        if donate:
            jax.block_until_ready(arranged)
            array.delete()
        return arranged

    return jax.tree.map(put, params, parameter_formats(mesh, params))


def formats_of(params: Any) -> Any:
    """Returns what `parameter_formats` would, of arrays or shapes that are already so."""
    return jax.tree.map(lambda x: Format(OHWI, x.sharding) if _is_ohwi(x) else x.sharding, params)


def _is_ohwi(array: Any) -> bool:
    layout = array.format.layout
    return layout is not None and layout.major_to_minor == OHWI.major_to_minor
