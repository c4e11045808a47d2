"""Disk space of pairs: raw JPEGs, and encoded for SD1.5 and SDXL with every option.

    python benchmarks/speed/storage.py [--pairs=100] [--prompts=100]

Writes a few pairs with encode's own writer and divides the file sizes. There is no full-size VAE
here: moments and embeddings are drawn from normal distributions with the spread of real ones,
independently per pixel. Real ones have similar neighbours, so they compress at least as well.
Raw images are noise with the 1/f spectrum of photographs, as JPEG of quality 95 without
subsampling. They have no smooth areas, and so are larger than most photographs. Figures for the
complete Pick-a-Pic v2 are extrapolated, and compared with the 335 GB of its distributed images.
Writes benchmarks/results/storage.json and prints a table.
"""

import argparse
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for the tests' writer
from dmpo_jax.data import sources  # noqa: E402
from dmpo_jax.data.encoded import records  # noqa: E402
from dmpo_jax.data.encoded.meta import EncodedMeta  # noqa: E402
from dmpo_jax.data.encoded.pair import ARRAYS  # noqa: E402
from tests.support.encoded import EncodedPair, PromptEmbedding, write_pairs  # noqa: E402

HERE = pathlib.Path(__file__).parent
PICK_A_PIC = {"pairs": 850_000, "prompts": 58_000, "raw_bytes": 335e9}
# side of the images and of the latents, in pixels; widths of the prompt embeddings
MODELS = {
    "SD1.5": {"side": 512, "latent": 64, "context": 768, "pooled": None},
    "SDXL": {"side": 1024, "latent": 128, "context": 2048, "pooled": 1280},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bfloat16 sample": {},
    "bfloat16 mean": {"moments": "mean"},
    "bfloat16 sample, flip": {"flip": True},
    "bfloat16 mean, flip": {"moments": "mean", "flip": True},
    "float16 sample": {"dtype": "float16"},
    "float32 sample": {"dtype": "float32"},
}


def draw_moments(rng: np.random.Generator, side: int, moments: str, dtype: str) -> np.ndarray:
    """Draws means of deviation 5 (1 / 0.18215) and log-variances near -18, as SD's VAEs have."""
    mean = rng.normal(0, 5, (2, side, side, 4))
    if moments == "mean":
        return mean.astype(dtype)
    return np.concatenate([mean, rng.normal(-18, 2, mean.shape)], axis=-1).astype(dtype)


def make_pairs(
    count: int, side: int, *, moments: str = "sample", dtype: str = "bfloat16", flip: bool = False
) -> Iterator[EncodedPair]:
    rng = np.random.default_rng(0)
    sizes = np.full((2, 6), 8 * side, np.int32)
    for i in range(count):
        drawn = [draw_moments(rng, side, moments, dtype) for _ in range(1 + flip)]
        flipped = drawn[1] if flip else None
        yield EncodedPair(f"x:{i}", 1, 1.0, drawn[0], sizes, flipped=flipped)


def make_prompts(count: int, context: int, pooled: int | None) -> Iterator[PromptEmbedding]:
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, 1, shape).astype(np.float16)

    for j in range(count):
        yield PromptEmbedding("p" * j, draw(77, context), draw(pooled) if pooled else None)


def measure_option(model: dict[str, Any], option: dict[str, Any], pairs: int) -> dict[str, float]:
    """Measures bytes per pair: of the arrays, and on disk."""
    with tempfile.TemporaryDirectory() as folder:
        meta = {"model": "x", "scaling_factor": 1.0, "moments": option.get("moments", "sample")}
        prompts = make_prompts(2, 8, None)
        write_pairs(folder, {"train": make_pairs(pairs, model["latent"], **option)}, prompts, meta)
        found = records.open_pairs(folder).meta
        return {
            "array_bytes": pair_bytes(found.to_json()["shapes"]),
            "disk_bytes": disk_bytes(found, records.NAME) / pairs,
        }


def measure_prompts(model: dict[str, Any], prompts: int) -> float:
    """Measures bytes on disk of a prompt's embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = make_prompts(prompts, model["context"], model["pooled"])
        pairs = make_pairs(1, 8)
        meta = {"model": "x", "scaling_factor": 1.0}
        write_pairs(folder, {"train": pairs}, drawn, meta)
        return disk_bytes(records.open_pairs(folder).meta, "prompts") / prompts


def pair_bytes(shapes: dict[str, Any]) -> int:
    """Bytes of the arrays of one pair, before compression."""
    arrays = [shapes[name] for name in ARRAYS if shapes.get(name)]
    return sum(math.prod(x["shape"]) * np.dtype(x["dtype"]).itemsize for x in arrays)


def disk_bytes(meta: EncodedMeta, begins: str) -> int:
    return sum(size for name, size in meta.files.items() if name.startswith(begins))


def measure_jpegs(side: int, count: int = 8) -> float:
    """Measures bytes of a pair of JPEGs."""
    rng = np.random.default_rng(2)
    return 2 * float(np.mean([len(sources.encode_image(photo(rng, side))) for _ in range(count)]))


def photo(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draws an image with the 1/f spectrum and the similar channels of photographs."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    fall = 1 / np.maximum(np.hypot(fy, fx), 1 / side)

    def plane() -> np.ndarray:
        x = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(side, side))) * fall, s=(side, side))
        return (x - x.mean()) / x.std()

    grey = plane()
    image = np.stack([grey + 0.3 * plane() for _ in range(3)], axis=-1)
    return np.clip(128 + 45 * image, 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=100)
    args = parser.parse_args()
    whole, results = PICK_A_PIC, {"pick_a_pic_v2": PICK_A_PIC, "models": {}}
    lines = [
        "| model | stored | kB a pair, in arrays | kB a pair, on disk | Pick-a-Pic v2, GB |"
        " of its 335 GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        jpegs, prompt = measure_jpegs(model["side"]), measure_prompts(model, args.prompts)
        store = prompt * whole["prompts"]
        results["models"][name] = found = {
            "jpeg_bytes_a_pair": jpegs,
            "prompt_bytes": prompt,
            "prompt_store_bytes": store,
            "options": {},
        }
        lines.append(
            f"| {name} | JPEGs, {model['side']} px | | {jpegs / 1e3:.0f} | "
            f"{jpegs * whole['pairs'] / 1e9:.0f} | |"
        )
        for option, settings in OPTIONS.items():
            one = measure_option(model, settings, args.pairs)
            total = one["disk_bytes"] * whole["pairs"] + store
            found["options"][option] = {**one, "pick_a_pic_v2_bytes": total}
            lines.append(
                f"| {name} | {option} | {one['array_bytes'] / 1e3:.1f} | "
                f"{one['disk_bytes'] / 1e3:.1f} | {total / 1e9:.0f} ({store / 1e9:.1f} prompts) | "
                f"{total / whole['raw_bytes']:.0%} |"
            )
    (HERE.parent / "results" / "storage.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
