"""Input throughput: encoded pairs to a host batch, against PyTorch's DataLoader over raw JPEGs.

    python benchmarks/speed/input_pipeline.py

For SD1.5 and SDXL, on one core and on two: pairs per second of `pipeline.make_batches` at its
default threads; of a bare read of the same ArrayRecord records; of a raw read of as many
bytes of the same files; and of a DataLoader. The DataLoader decodes two JPEGs per pair (512 or
1024 pixels, the size of the model's images, so that none is resized), normalises, stacks and
tokenizes, as peers' training scripts do before the VAE, which is not counted. Each measurement
is a separate process; rounds alternate. Files are in the page cache unless a row says otherwise.
Pairs per CPU second count the time of the process and its workers only, whatever else is running.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "input_pipeline.json"
PICK_A_PIC_PROMPTS = 58_000
SEED, DROPOUT = 0, 0.2
# latent side, tokens, context, pooled, JPEG side, batch, tokenizers
MODELS = {
    "sd15": (64, 77, 768, 0, 512, 64, 1),
    "sdxl": (128, 77, 2048, 1280, 1024, 32, 2),
}
STAGES = (
    "order and draws",
    "read pair",
    "parse pair",
    "read prompt",
    "parse prompt",
    "copy into batch",
)
KINDS = ("ours", "array_record", "raw", "torch")
ALONE = ("ours, cold", "raw, cold", "profile", "resume")  # on one core
SAID = {
    "ours": "encoded pairs to host batch",
    "ours, cold": "the same, files dropped from the page cache first",
    "array_record": "bare ArrayRecord read of the same records",
    "raw": "raw read of as many bytes",
    "raw, cold": "raw read, files dropped from the page cache first",
    "torch": "PyTorch DataLoader over JPEGs",
}


def main() -> None:
    args = parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory(dir=args.data) as folder:
        made = {model: make_data(pathlib.Path(folder), model, args) for model in MODELS}
        result = {"machine": machine(), "data": made, **run_all(args, folder)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"written to {args.out}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of everything, alternating (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed a process (2)")
    parser.add_argument("--pairs", type=int, default=3000, help="of SD1.5; SDXL a third (3000)")
    parser.add_argument("--data", help="folder for 1.5 GB of data, deleted after (temporary)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help=f"({RESULTS})")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "?")
    return {"cpu": name, "cores": os.cpu_count(), "load_average": os.getloadavg()}


def run_all(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Runs every measurement in turns, `rounds` times."""
    jobs = [(kind, model, cores) for model in MODELS for cores in (1, 2) for kind in KINDS] + [
        (kind, model, 1) for model in MODELS for kind in ("ours, cold", "profile", "resume")
    ]
    jobs = [job for job in jobs if job[2] <= len(os.sched_getaffinity(0))]
    found: dict[tuple, list[Any]] = {job: [] for job in jobs}
    for number in range(args.rounds):
        for kind, model, cores in jobs:
            command = [sys.executable, __file__, f"--measure={kind}", f"--model={model}"]
            command += [f"--folder={folder}", f"--cores={cores}", f"--seconds={args.seconds}"]
            command += [f"--pairs={args.pairs if model == 'sd15' else args.pairs // 3}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[kind, model, cores].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    result: dict[str, Any] = {"speed": [], "profile_us": {}, "resume_ms": {}}
    for (kind, model, cores), runs in found.items():
        middle = {name: spread([run[name] for run in runs]) for name in runs[0]}
        if kind in ("profile", "resume"):
            result["profile_us" if kind == "profile" else "resume_ms"][model] = middle
        else:
            result["speed"].append({"kind": kind, "model": model, "cores": cores, **middle})
    return result


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def make_data(folder: pathlib.Path, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Writes encoded pairs of random latents, and JPEGs; both as large as real ones."""
    import ml_dtypes
    from etils import epath

    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # for the tests' writer
    from dmpo_jax.toy.make import write_tokenizer
    from tests.support.encoded import EncodedPair, PromptEmbedding, write_pairs

    side, tokens, width, pooled, pixels, _, _ = MODELS[model]
    count = args.pairs if model == "sd15" else args.pairs // 3
    prompts, rng = max(count // 2, 2), np.random.default_rng(SEED)

    def normal(*shape, dtype: Any = np.float16):
        return rng.standard_normal(shape, np.float32).astype(dtype)

    def pair(i):
        moments = normal(2, side, side, 8, dtype=ml_dtypes.bfloat16)
        sizes = np.full((2, 6), pixels, np.int32)
        return EncodedPair(f"{i}", int(rng.integers(1, prompts)), 0.75, moments, sizes)

    def prompt(j):
        text = caption(j) if j else ""
        embedding = normal(tokens, width), normal(pooled) if pooled else None
        return PromptEmbedding(text, *embedding)

    meta = {"model": model, "scaling_factor": 1.0}
    splits = {"train": map(pair, range(count))}
    write_pairs(folder / model, splits, map(prompt, range(prompts)), meta)
    jpegs = folder / f"{model}_jpeg"
    jpegs.mkdir()
    for i in range(2 * 64):
        (jpegs / f"{i}.jpg").write_bytes(picture(rng, pixels))
    write_tokenizer(epath.Path(folder / f"{model}_tokenizer"))
    os.sync()  # dirty pages cannot be dropped from the page cache
    image = statistics.mean(path.stat().st_size for path in jpegs.iterdir())
    stored = sum(path.stat().st_size for path in (folder / model).glob("*train*"))
    return {"pairs": count, "bytes_a_pair": stored / count, "bytes_a_jpeg": image}


def caption(j: int) -> str:
    return f"a photograph of an astronaut number {j} riding a horse, highly detailed, 8k"


def picture(rng: np.random.Generator, side: int) -> bytes:
    """Draws a JPEG of noise at many scales, about as hard to code as a photograph."""
    import io

    from PIL import Image

    total = np.zeros((side, side, 3), np.float32)
    for scale in (4, 16, 64, side // 2, side):
        noise = rng.integers(0, 256, (scale, scale, 3), np.uint8)
        grown = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        total += np.asarray(grown, np.float32) / scale**0.5
    total -= total.min()
    buffer = io.BytesIO()
    Image.fromarray((total * (255 / total.max())).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Runs one measurement in this process, on `cores` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    if args.measure == "resume":
        return resume(args)
    if args.measure == "profile":
        return profile(args)
    kind, _, cold = args.measure.partition(", ")
    make = {"ours": ours, "array_record": array_record, "raw": raw, "torch": torch_loader}
    batches = make[kind](args)
    if cold:  # stops before a record is read twice
        for path in (args.folder / args.model).iterdir():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return timed(batches, args.seconds, warm_up=0, most=args.pairs // 2)
    return timed(batches, args.seconds, warm_up=2)


def timed(
    batches: Iterator[int], seconds: float, *, warm_up: int, most: int | None = None
) -> dict[str, float]:
    """Measures pairs per second over at most `most` pairs; `batches` yields each batch's pairs."""
    for _ in range(warm_up):
        next(batches)
    pairs, wall, cpu, start = 0, 0.0, cpu_seconds(), time.perf_counter()
    while wall < seconds and (most is None or pairs < most):
        pairs += next(batches)
        wall = time.perf_counter() - start
    return {"pairs_per_second": pairs / wall, "pairs_per_cpu_second": pairs / (cpu_seconds() - cpu)}


def cpu_seconds() -> float:
    """CPU seconds of this process and its live workers, which RUSAGE_CHILDREN lacks."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    total = used.ru_utime + used.ru_stime
    tick = os.sysconf("SC_CLK_TCK")
    for task in pathlib.Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            stat = pathlib.Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(stat[11]) + int(stat[12])) / tick
    return total


def open_pairs(args: argparse.Namespace) -> Any:
    from dmpo_jax.data.batches import pipeline
    from dmpo_jax.data.encoded import records

    pairs = records.open_pairs(args.folder / args.model)
    # The cache is as rarely of use as with all of Pick-a-Pic's prompts.
    share = len(pairs.prompts) / PICK_A_PIC_PROMPTS
    pipeline.CACHED_PROMPTS = max(2, round(pipeline.CACHED_PROMPTS * share))
    return pairs


def make_batches(args: argparse.Namespace, pairs: Any, start: int = 0) -> Any:
    from dmpo_jax.config import configs
    from dmpo_jax.data.batches import pipeline

    batch, data = MODELS[args.model][5], configs.defaults().data
    return pipeline.make_batches(
        pairs,
        "train",
        global_batch=batch,
        rows=range(batch),
        seed=SEED,
        start_step=start,
        prompt_dropout=DROPOUT,
        num_threads=data.num_threads,
        prefetch=data.prefetch,
    )


def ours(args: argparse.Namespace) -> Iterator[int]:
    batches = make_batches(args, open_pairs(args))
    return (len(batch.preference) for batch in batches)  # the folder is open before the first batch


def elements(pairs: Any) -> Iterator[tuple[int, bool]]:
    """Yields (record, true if its prompt is dropped), in training's order."""
    from dmpo_jax.data.batches.order import Draws, Order

    order = Order([len(pairs.split("train"))], [1], seed=SEED)
    draws = Draws(seed=SEED, prompt_dropout=DROPOUT, drops_images=False, flip=False)
    for i in range(2**62):
        yield order[i][1], draws(i)[0]


def array_record(args: argparse.Namespace) -> Iterator[int]:
    """Reads the records of the batches in one thread and discards them."""
    pairs = open_pairs(args)
    source, prompts = pairs.split("train"), pairs.prompts
    picked = [next(it) for it in [elements(pairs)] for _ in range(1024)]
    prompt_of = [source[record].prompt for record, _ in picked]
    while True:
        for (record, dropped), prompt in zip(picked, prompt_of, strict=True):
            source._source[record]
            if not dropped:
                prompts._source[prompt]
            yield 1


def raw(args: argparse.Namespace) -> Iterator[int]:
    """Reads as many bytes as a pair's records take, at random offsets of the same files."""
    folder, rng = args.folder / args.model, np.random.default_rng(SEED)
    pairs = open_pairs(args)
    stores = []
    for pattern, count in (
        ("*train*", len(pairs.split("train"))),
        ("prompts*", len(pairs.prompts)),
    ):
        sizes = {path: path.stat().st_size for path in folder.glob(pattern)}
        largest = max(sizes, key=lambda path: sizes[path])
        stores.append((os.open(largest, os.O_RDONLY), sizes[largest], sum(sizes.values()) // count))
    buffer = bytearray(max(size for _, _, size in stores))
    while True:
        drops = rng.random(1024) < DROPOUT
        places = rng.random((1024, 2))
        for dropped, place in zip(drops, places, strict=True):
            for (file, length, size), at in zip(stores[: 2 - dropped], place, strict=False):
                os.preadv(file, [memoryview(buffer)[:size]], int(at * (length - size)))
            yield 1


def torch_loader(args: argparse.Namespace) -> Iterator[int]:
    """A DataLoader as in diffusers' and DiffusionDPO's training scripts."""
    import torch
    from PIL import Image
    from transformers import CLIPTokenizer

    torch.set_num_threads(1)
    _, _, _, _, side, batch, tokenizers = MODELS[args.model]
    folder = args.folder / f"{args.model}_jpeg"
    tokenizer = CLIPTokenizer.from_pretrained(args.folder / f"{args.model}_tokenizer")

    def load(path: pathlib.Path):
        with Image.open(path) as image:
            image = image.convert("RGB")
        if min(image.size) != side:  # torchvision's Resize also leaves the right size alone
            image = image.resize((side, side), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(0.5).div_(0.5)

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 2**20

        def __getitem__(self, i):
            images = [load(folder / f"{2 * (i % 64) + k}.jpg") for k in (0, 1)]
            options = {"max_length": 77, "padding": "max_length", "truncation": True}
            ids = [
                tokenizer(caption(i), return_tensors="pt", **options).input_ids[0]
                for _ in range(tokenizers)
            ]
            return {"pixel_values": torch.cat(images), "input_ids": torch.stack(ids)}

    # On one core a worker process only adds copies.
    workers = args.cores if args.cores > 1 else 0
    loader = torch.utils.data.DataLoader(
        Pairs(), batch_size=min(batch, 8), shuffle=True, num_workers=workers
    )
    for rows in loader:
        yield len(rows["input_ids"])


def profile(args: argparse.Namespace) -> dict[str, float]:
    """Measures CPU microseconds per pair by stage, in one thread."""
    from dmpo_jax.data.encoded.examples import read_example

    pairs = open_pairs(args)
    source, prompts = pairs.split("train"), pairs.prompts
    arrays = pairs.meta.arrays._asdict()
    size, count = MODELS[args.model][5], 0
    out = {
        name: np.empty((size, *arrays[name].shape), arrays[name].dtype)
        for name in ("moments", "context")
    }
    picked, start = elements(pairs), time.perf_counter()
    next(picked)  # sets up the order
    spent: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    last = 0.0

    def done(stage: str) -> None:
        nonlocal last
        now = time.thread_time()
        spent[stage] += now - last
        last = now

    while time.perf_counter() - start < args.seconds:
        row, last = count % size, time.thread_time()
        record, dropped = next(picked)
        done("order and draws")
        data = source._source[record]
        done("read pair")
        pair = read_example(data, arrays)
        done("parse pair")
        out["moments"][row] = pair["moments"]
        done("copy into batch")
        if not dropped:
            data = prompts._source[pair["prompt"][0]]
            done("read prompt")
            prompt = read_example(data, arrays)
            done("parse prompt")
            out["context"][row] = prompt["context"]
            done("copy into batch")
        count += 1
    return {stage: 1e6 * seconds / count for stage, seconds in spent.items()}


def resume(args: argparse.Namespace) -> dict[str, float]:
    """Measures milliseconds from the folder to the first batch, when started at a step."""
    found: dict[str, list[float]] = {}
    for _ in range(7):
        for step in (0, 1_000_000):
            start = time.perf_counter()
            batches = make_batches(args, open_pairs(args), step)
            next(batches)
            found.setdefault(f"step {step}", []).append(1e3 * (time.perf_counter() - start))
            batches.close()
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def table(result: dict[str, Any]) -> str:
    lines = ["| | model | cores | pairs/s | pairs a CPU second |", "|---|---|---|---|---|"]
    for row in result["speed"]:
        wall, cpu = (
            f"{row[name]['median']:,.0f} ({row[name]['low']:,.0f} to {row[name]['high']:,.0f})"
            for name in ("pairs_per_second", "pairs_per_cpu_second")
        )
        lines.append(f"| {SAID[row['kind']]} | {row['model']} | {row['cores']} | {wall} | {cpu} |")
    lines += ["", "| CPU time a pair | us |", "|---|---|"]
    for model, stages in result["profile_us"].items():
        lines += [f"| {model}: {stage} | {us['median']:.0f} |" for stage, us in stages.items()]
    lines += ["", "| folder to first batch | ms |", "|---|---|"]
    for model, steps in result["resume_ms"].items():
        lines += [
            f"| {model}, {step} | {ms['median']:.0f} ({ms['low']:.0f} to {ms['high']:.0f}) |"
            for step, ms in steps.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
