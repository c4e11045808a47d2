"""Content of a run: the model's weights and the encoded pairs."""

from dmpo_jax import diffusers_io
from dmpo_jax.data.batches.mixture import Mixture
from dmpo_jax.data.encoded.records import EncodedPairs
from dmpo_jax.errors import UserError


def content(
    start: diffusers_io.Start,
    reference: diffusers_io.Start | None = None,
    pairs: EncodedPairs | Mixture | None = None,
) -> dict[str, str]:
    """Returns hashes of what a run is made from, by the names that `Leaf.content` has.

    start, reference: the weights that the run begins with, and is measured against. A run without
        leaves for them records them too: one that names others is then another run.
    pairs: None if they are not encoded yet. None also leaves out the reference.
    """
    own = start._replace(folder=None, lora=None).digest()
    found = {"model weights": own, "start weights": start.digest() if start.name else own}
    if reference is not None:
        same = reference is start
        found["reference weights"] = found["start weights"] if same else reference.digest()
    return found | ({"encoded pairs": pairs.identity} if pairs else {})


def check_encoders(
    pairs: EncodedPairs | Mixture,
    folder: str,
    *,
    vae: str,
    variant: str | None,
    any_weights: bool = False,
) -> None:
    """Checks that this pipeline's VAE and text encoders made the pairs, in any variant of theirs.

    vae: folder of a VAE used in place of the pipeline's own, or "". Pairs that do not say what
    made them pass, and all pairs with `any_weights`.

    Raises:
        UserError: a part's weights differ; names the parts and the options to change.
    """
    metas = [part.meta for part in (pairs.sets if isinstance(pairs, Mixture) else [pairs])]
    if any_weights or not any(meta.content for meta in metas):
        return
    names = {part for meta in metas for part in meta.content}
    here = diffusers_io.digest_variants(folder, names, vae=vae, variant=variant)
    for meta in metas:
        differing = [part for part, x in meta.content.items() if x not in here.get(part, ())]
        if not differing:
            continue
        said = f"other weights of {' and '.join(differing)} than {folder} has"
        said += f" with model.vae={vae}" if vae else ""
        hint = "encode the pairs with this model"
        if differing == ["vae"] and meta.vae != vae:
            hint = f"use theirs, --config.model.vae={meta.vae}" if meta.vae else "drop model.vae"
        raise UserError(
            f"the encoded pairs were made by {said}: {hint}; --config.data.any_encoders=true "
            "trains on them as they are"
        )
