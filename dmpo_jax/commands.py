"""The commands: the arguments of each, and the job that it calls.

`COMMANDS` is the one table behind `dmpo-jax NAME`, `launch/NAME.py` and `dmpo_jax.NAME(...)`.
Every command takes every leaf as `--config.section.key`; its interface adds short names.
"""

import logging
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import app

from dmpo_jax import storage
from dmpo_jax.config import checks, parsing, reference
from dmpo_jax.config.command_line import in_words, log_to_console
from dmpo_jax.config.configs import Config
from dmpo_jax.config.declare import Check, Leaf, OneOf
from dmpo_jax.config.files import load_config
from dmpo_jax.config.parsing import Interface
from dmpo_jax.config.sections import DTYPES
from dmpo_jax.diffusers_io import LORA_KEYS
from dmpo_jax.errors import STOPPED, STOPPED_ANEW, UserError
from dmpo_jax.families import PUBLISHED
from dmpo_jax.scoring import KINDS, SCORERS, STATISTICS
from dmpo_jax.toy import digits

LOG = logging.getLogger(__name__)
FOLDER = Check(storage.may_be_folder, "a folder that can be made and written")
OUT = Leaf(None, "folder to write", FOLDER)
PROMPTS = Leaf(None, "file of prompts, one a line")
PIPELINE = {"model": "model.folder", "variant": "model.variant", "vae": "model.vae"}
SAMPLING = {
    "dtype": "model.compute_dtype",
    "seed": "seed",
    "steps": "sample.steps",
    "guidance_scale": "sample.guidance_scale",
    "negative_prompt": "sample.negative_prompt",
    "sampler": "sample.sampler",
    "image_guidance_scale": "sample.image_guidance_scale",
    "vae_dtype": "sample.vae_dtype",
    "height": "sample.height",
    "width": "sample.width",
    "batch_size": "sample.batch_size",
}


class Command(NamedTuple):
    """One command.

    about: help text; its first line is a summary. call: (config, options) -> result.
    check: raises ValueError for a config that the command cannot run, beyond each leaf's own
        check. It may set leaves that are unset.
    resumes: after Ctrl-C, the same command continues the work.
    """

    about: str
    interface: Interface
    call: Callable[[Config, dict[str, Any]], Any]
    check: Callable[[Config, dict[str, Any]], None] = lambda config, options: None
    resumes: bool = False


def _next(command: str) -> None:
    LOG.info("next: dmpo-jax %s", command)


def _join(config: Config) -> None:
    from dmpo_jax.parallel import processes

    processes.join_and_quiet(**config.distributed)


def _train(config: Config, options: dict[str, Any]) -> Any:
    from dmpo_jax.config.about import next_commands
    from dmpo_jax.jobs.run import run
    from dmpo_jax.training.run_page import PAGE

    workdir = run(config, **options)
    if config.log.page and (page := workdir / PAGE).exists():
        LOG.info("the run's page: %s", page)
    if config.jobs[-1:] in (("train",), ("evaluate",)):
        first, *_ = next_commands(config, workdir)
        LOG.info("next: %s", first.command)
    return workdir


def _check_train(config: Config, options: dict[str, Any]) -> None:
    if not options["dry_run"]:  # which lists these faults among the others
        checks.validate(config)


def _calibrate(config: Config, options: dict[str, Any]) -> Any:
    from dmpo_jax.calibration.report import page
    from dmpo_jax.jobs.calibrate import FILE
    from dmpo_jax.jobs.run import run

    rest = {name: options[name] for name in ("updates", "rates")}
    workdir = run(config, options["workdir"], calibration=rest)
    found = storage.read_json(workdir / FILE)
    print(page(found))
    _next(f"train --config=CONFIG {found['paste']}")
    return found


def _check_calibrate(config: Config, options: dict[str, Any]) -> None:
    from dmpo_jax.jobs.calibrate import find, parse_rates

    checks.validate(config)
    find(config)
    parse_rates(options["rates"])


def _encode(config: Config, options: dict[str, Any]) -> Any:
    if options["inspect"]:
        from dmpo_jax.jobs.inspect import inspect

        page = inspect(config, out=options["inspect"])
        _next(f"encode --source={config.data.source} --model=FOLDER --out=DIR")
        return page
    from dmpo_jax.jobs.encode import encode

    _join(config)
    out = encode(config, out=options["out"])
    vae = f" --config.model.vae={config.model.vae}" if config.model.vae else ""
    model = f"--config.model.folder={config.model.folder}{vae}"
    _next(f"train --config=CONFIG {model} --config.data.encoded={out}")
    return out


def _check_encode(config: Config, options: dict[str, Any]) -> None:
    if not options["inspect"] and not (config.model.folder and options["out"]):
        raise UserError("--model and --out are required, or --inspect")


def _collect(config: Config, options: dict[str, Any]) -> Any:
    from dmpo_jax.jobs.collect import collect

    _join(config)
    path = collect(config, **options)
    _next(f"encode --source=pickapic:{path} --model={config.model.folder} --out=DIR")
    return path


def _sample(config: Config, options: dict[str, Any]) -> Any:
    from dmpo_jax.jobs.sample import sample

    _join(config)
    return sample(config, **options)


def _evaluate(config: Config, options: dict[str, Any]) -> Any:
    from dmpo_jax.jobs.evaluate import evaluate

    _join(config)
    return evaluate(config, **options)


def _check_evaluate(config: Config, options: dict[str, Any]) -> None:
    if not (config.evaluate.judges or config.collect.scorer or options["scores"]):
        raise UserError(
            f"--judges or --scores is required: {', '.join(f'{kind}:FOLDER' for kind in KINDS)}; "
            f"{', '.join((*SCORERS, *STATISTICS))}; or PATH.py:FUNCTION of your own"
        )


def _convert(config: Config, options: dict[str, Any]) -> Any:
    if not options["push"]:
        return _make_export(options)
    from dmpo_jax.export.hub import log_in
    from dmpo_jax.jobs.push import push

    # Before the export is made: it may take long, and a login that fails would come after it.
    api = None if options["push_dry_run"] else log_in(options["push"])
    out = _make_export(options) if options["checkpoint"] else options["out"]
    return push(out=out, repository=options["push"], api=api)


def _make_export(options: dict[str, Any]) -> Any:
    if options["single_file"]:
        from dmpo_jax.jobs.single_file import single_file

        return single_file(file=options["single_file"], out=options["out"], like=options["like"])
    if options["scorer"]:
        from dmpo_jax.jobs.convert_scorer import convert_scorer

        return convert_scorer(scorer=options["scorer"], out=options["out"], like=options["like"])
    from dmpo_jax.jobs.convert import convert

    out = convert(
        workdir=options["checkpoint"],
        out=options["out"],
        at=options["step"],
        shard_bytes=int(options["shard_gb"] * 10**9),
        **{name: options[name] for name in ("weights", "merge", "dtype", "verify", "lora_keys")},
    )
    if (out / "model_index.json").exists():
        _next(f"sample --model={out} --prompts=FILE --out=DIR")
    else:
        LOG.info("next, in PyTorch: pipeline.load_lora_weights(%r)", str(out))
    return out


def _check_convert(config: Config, options: dict[str, Any]) -> None:
    kinds = [kind for kind in ("checkpoint", "single_file", "scorer") if options[kind]]
    if not options["push"]:
        if options["push_dry_run"]:
            raise UserError("--push_dry_run lists what --push would send: add --push=ORG/NAME")
        if len(kinds) != 1:
            raise UserError("give one of --checkpoint, --single_file and --scorer")
        return
    from dmpo_jax.export.hub import check_repository

    check_repository(options["push"])
    if kinds not in ([], ["checkpoint"]):
        raise UserError(
            f"--push sends a run's export with its model card, not what --{kinds[0]} makes: give "
            "--checkpoint=WORKDIR, or --out=DIR alone to send the export that is there"
        )
    if storage.is_remote(options["out"]):
        raise UserError(f"--push sends a local folder: choose another --out than {options['out']}")


def _verify(config: Config, options: dict[str, Any]) -> Any:
    from dmpo_jax.jobs.verify import verify

    return verify(**options)


def _plan(config: Config, options: dict[str, Any]) -> Any:
    from dmpo_jax.jobs.plan import plan, prepare_process
    from dmpo_jax.planning.report import printed

    prepare_process(options["topology"])
    rest = {name: options[name] for name in ("out", "cache")}
    plans = plan(config, options["topology"], published=options["model"], **rest)
    print(printed(plans))
    if options["out"]:
        LOG.info("the plans are in %s", options["out"])
    return plans


def _check_plan(config: Config, options: dict[str, Any]) -> None:
    if options["model"] and not config.model.folder:
        config.model.folder = options["model"]
    checks.validate(config)


def _make_digits(config: Config, options: dict[str, Any]) -> Any:
    from dmpo_jax.jobs.make_digits import make_digits

    return make_digits(**options, seed=config.seed)


COMMANDS = {
    "train": Command(
        """Runs the jobs that a config names: for most, training; for the digits, everything.

    {me} --config=digits_dmpo [--workdir=DIR]
    {me} --config=sdxl_dmpo --config.model.folder=FOLDER ...
    {me} --config=sdxl_dmpo:debug

--config is the name of a config that the package brings, or the path of your own, PATH.py. Run
again with the same --workdir, it resumes where it stopped. --fork=NEW goes on from its newest
checkpoint with other settings, as a new run in NEW: same model and reference, step and schedule
from 0, the optimizer's moments too unless optimizer.name differs.""",
        Interface(
            {},
            {
                "workdir": Leaf("", "the run's folder; '' is runs/NAME-OF-CONFIG", FOLDER),
                "fork": Leaf("", "a new folder: go on there from workdir's newest checkpoint"),
                "dry_run": Leaf(False, "print what would be done, needed and refused; then exit"),
            },
            config=None,
        ),
        _train,
        _check_train,
        resumes=True,
    ),
    "calibrate": Command(
        """Suggests a beta that fits, and says if the learning rate does, by short probes.

    {me} --config=digits_dmpo [--workdir=DIR]
    {me} --config=sdxl_dmpo --config.model.folder=FOLDER --config.data.encoded=DIR ...

Takes what train takes, and the jobs before training run first if their results are not there yet.
Each probe makes the run's first updates at one beta and one rate; there are about six, and the
step compiles once. Writes WORKDIR/calibration.json and calibration.md, and nothing else: a later
train in WORKDIR is as without. Prints what would come out at other betas and rates, and the line
to paste.""",
        Interface(
            {},
            {
                "workdir": Leaf("", "the run's folder; '' is runs/NAME-OF-CONFIG", FOLDER),
                "updates": Leaf(30, "updates of a probe", "[4, inf)"),
                "rates": Leaf(("0.33", "1", "3"), "factors on the learning rate to probe"),
            },
            config=None,
        ),
        _calibrate,
        _check_calibrate,
    ),
    "encode": Command(
        """Encodes raw preference pairs: VAE latents of the images, embeddings of each prompt once.

    {me} --source=pickapic:PATH --model=FOLDER --out=DIR
    {me} --source=pickapic:PATH --inspect=DIR

Training then reads DIR (`--config.data.encoded=DIR`) and loads neither VAE nor text encoder. The
same command resumes one that was killed. On several machines run the same line on each, --out
being a folder that all of them see.

--prompts=FOLDER takes the prompts' embeddings from there, and no text encoder is loaded: encoded
pairs; or prompts.txt (one a line, an empty one among them) and *.safetensors with context [N, S, D]
and, if the model takes them, pooled [N, P] and lengths [N]. --inspect encodes nothing: it writes a
page that shows the pairs, DIR/index.html.""",
        Interface(
            {
                "source": "data.source",
                "prompts": "data.prompts",
                **PIPELINE,
                "dtype": "model.compute_dtype",
                "resolution": "data.resolution",
                "crop": "data.crop",
                "moments": "data.moments",
                "moments_dtype": "data.moments_dtype",
                "flip": "data.flip",
                "ties": "data.ties",
                "validation_fraction": "data.validation_fraction",
                "max_bad": "data.max_bad",
                "allow_outside": "data.allow_outside",
                "batch_size": "data.encode_batch",
                "num_threads": "data.num_threads",
            },
            {
                "out": Leaf(None, "folder for the encoded pairs", FOLDER),
                "inspect": Leaf(None, "folder for a page about the source, instead", FOLDER),
                "distributed": Leaf(False, "of no effect: clusters are found without"),
            },
            required=("source",),
        ),
        _encode,
        _check_encode,
        resumes=True,
    ),
    "collect": Command(
        """Makes preference pairs from a model's own images: two a prompt, labelled by a scorer.

    {me} --model=FOLDER --prompts=FILE --scorer=NAME --out=DIR

Writes DIR/pairs.parquet in Pick-a-Pic's schema, for encode --source=pickapic:DIR.""",
        Interface(
            {
                **PIPELINE,
                **SAMPLING,
                "scorer": "collect.scorer",
                "pairs": "collect.pairs",
                "temperature": "collect.temperature",
                "labels": "collect.labels",
                "tie_margin": "collect.tie_margin",
            },
            {"prompts": PROMPTS, "out": OUT},
            required=("model", "scorer", "prompts", "out"),
        ),
        _collect,
        resumes=True,
    ),
    "sample": Command(
        """Draws images from a diffusers pipeline folder, in JAX.

    {me} --model=FOLDER --prompts=FILE --out=DIR
    {me} --model=FOLDER --lora=FILE:0.8,FILE --prompts=FILE --out=DIR

Writes one PNG an image with its settings inside, and DIR/grid.png, a row a prompt.

FILE has a prompt a line, or is .json, .jsonl, .csv, .tsv or .parquet with `prompt` and, if need
be, `negative_prompt`, `seed`, `image` and `mask` of each; images are for models that edit or
inpaint, and their paths relative to FILE.""",
        Interface(
            {**PIPELINE, **SAMPLING, "images_per_prompt": "sample.images_per_prompt"},
            {
                "prompts": PROMPTS,
                "out": OUT,
                "lora": Leaf((), "LoRA files to merge in, FILE or FILE:SCALE,...", kind=tuple),
            },
            required=("model", "prompts", "out"),
        ),
        _sample,
        resumes=True,
    ),
    "evaluate": Command(
        """Compares models: same prompts, same seeds, each scorer's win rate with its interval.

    {me} --a=BASE --b=TUNED --prompts=FILE --judges=pickscore:DIR,hpsv21:DIR --out=DIR
    {me} --a=BASE --b=dmpo=TUNED,dpo=OTHER --prompts=FILE --judges=... --out=DIR

Models are pipeline folders, or folders of images. Writes DIR/result.json, the page
DIR/report/index.html, and every image with its scores, DIR/images.jsonl. Run again, it resumes;
with other judges it scores the same images.""",
        Interface(
            {
                "judges": "evaluate.judges",
                "seeds": "evaluate.seeds",
                "images_per_prompt": "evaluate.images_per_prompt",
                "estimand": "evaluate.estimand",
                "noise": "evaluate.noise",
                "protocol": "evaluate.protocol",
                "single_file": "evaluate.single_file",
                "labelled_by": "collect.scorer",
                "variant": "model.variant",
                "vae": "model.vae",
                **SAMPLING,
            },
            {
                "a": Leaf(None, "the base: a pipeline, or a folder of images"),
                "b": Leaf(None, "the tuned models: FOLDER, or NAME=FOLDER,NAME=FOLDER,..."),
                "scores": Leaf((), "NAME:FILE.jsonl, scores that another program gave", kind=tuple),
                "prompts": PROMPTS,
                "out": OUT,
            },
            required=("a", "b", "prompts", "out"),
        ),
        _evaluate,
        _check_evaluate,
        resumes=True,
    ),
    "convert": Command(
        """Turns a training checkpoint into what PyTorch diffusers opens; or one file into a folder.

    {me} --checkpoint=WORKDIR [--step=N] --out=DIR
    {me} --checkpoint=WORKDIR --lora_keys=kohya --out=DIR
    {me} --checkpoint=WORKDIR --merge --dtype=float16 --verify --out=DIR
    {me} --single_file=MODEL.safetensors --out=DIR
    {me} --scorer=hpsv2:HPS_v2_compressed.pt --like=CLIP_FOLDER --out=DIR
    {me} --checkpoint=WORKDIR --out=DIR --push=ORG/NAME [--push_dry_run]

A checkpoint of every parameter becomes a pipeline folder; one of LoRA adapters a file for
`load_lora_weights`, or with --merge a pipeline folder too. A README.md says how it was made.
--scorer reads a reward model's pickle, and runs none of the code in it. --push then sends the
export to the Hugging Face hub; without --checkpoint it sends the export that DIR holds.""",
        Interface(
            {},
            {
                "checkpoint": Leaf("", "a run's --workdir"),
                "single_file": Leaf("", "a .safetensors file of a whole model"),
                "scorer": Leaf("", "KIND:FILE, a reward model's .pt, .pth or .bin"),
                "out": OUT,
                "step": Leaf(None, "which checkpoint; unset: the newest", "[0, inf)", kind=int),
                "weights": Leaf(
                    "auto",
                    "auto: the moving average where there is one",
                    OneOf(("auto", "policy", "ema")),
                ),
                "merge": Leaf(False, "fold LoRA adapters into the model"),
                "dtype": Leaf("float32", "of the model as written", OneOf((*DTYPES, "float16"))),
                "shard_gb": Leaf(5.0, "largest weight file, in GB", "[0.001, inf)"),
                "verify": Leaf(False, "compare with PyTorch diffusers, which must be installed"),
                "lora_keys": Leaf(
                    "diffusers",
                    "names in a LoRA file; kohya: of UNets, for ComfyUI and kohya's scripts too",
                    OneOf(LORA_KEYS),
                ),
                "like": Leaf(
                    "", "a folder: --single_file takes its configs, --scorer its tokenizer"
                ),
                "push": Leaf(
                    "", "hub repository to send the export to, ORG/NAME; a new one is private"
                ),
                "push_dry_run": Leaf(
                    False, "with --push: list files, sizes and the card, and send nothing"
                ),
            },
            required=("out",),
        ),
        _convert,
        _check_convert,
    ),
    "verify": Command(
        """Verifies a folder that a command has written: is every byte of it as it was written.

    {me} FOLDER

Encoded pairs by their sha256, checkpoints by their checksums, a pipeline by loading it and by
finding every number finite, collected pairs by reading them; a workdir with all that is in it.
Exit status 1 if a part is damaged or incomplete.""",
        Interface({}, {"folder": Leaf(None, "the folder")}, required=("folder",), first="folder"),
        _verify,
    ),
    "plan": Command(
        """Compiles a config's training step for chips that may be absent: does it fit, how fast.

    {me} --config=sdxl_dmpo --model=sdxl --topology=v5e:4x4,v5p:2x2x1
    {me} --config=... --topology=h100:8,l40s:1 --out=plan.json

TPU slices (v4, v5e, v5p, v6e) need their compiler alone (pip install libtpu), GPUs by name and
count (a100, a100-40gb, h100, h200, l40s) theirs (pip install 'jax[cuda13-local]'): neither needs
the chip. gpu:N and cpu:N are this machine's own, which tune kernels as training does.
Full-size models compile for minutes. Plans are remembered: the same one again is instant.""",
        Interface(
            {},
            {
                "topology": Leaf(None, "v5p:4x4x4,h100:8,gpu:8,...", kind=tuple),
                "model": Leaf("", "shapes of this, not of model.folder", OneOf(("", *PUBLISHED))),
                "out": Leaf("", "file for the plans, as JSON"),
                "cache": Leaf("", "folder of plans made before; '' is the user's cache"),
            },
            required=("topology",),
            config=None,
        ),
        _plan,
        _check_plan,
    ),
    "make_digits": Command(
        """Makes a digits pipeline that the package ships, less its model's training.

    {me} --out=runs/digits
    dmpo-jax train --config=digits_base --workdir=runs/digits_base

    {me} --family=sd3 --vae=dmpo_jax/toy/pipeline --out=runs/digits_flow
    dmpo-jax train --config=digits_flow_base --workdir=runs/digits_flow_base

The first command trains the VAE on scikit-learn's digits, or takes another pipeline's, and writes
an untrained model, a UNet or a flow transformer; the second trains the model. Its export is then
what stands in `dmpo_jax/toy/pipeline` and in `dmpo_jax/toy/flow_pipeline`.""",
        Interface(
            {"seed": "seed"},
            {
                "out": OUT,
                "family": Leaf(
                    "sd", "sd: a UNet; sd3: a flow transformer", OneOf((*digits.PIPELINES,))
                ),
                "vae": Leaf("", "folder of a pipeline whose VAE to take; '' trains one"),
                "vae_steps": Leaf(1000, "updates of the VAE, 64 images each", "[1, inf)"),
            },
            required=("out",),
        ),
        _make_digits,
    ),
}


def main(name: str, argv: list[str]) -> None:
    """Runs a command line and ends the process with its status; argv[0] is for messages.

    An invalid command line, config file or config ends the process with status 1 and a short
    message, before anything is compiled.
    """
    command, options = COMMANDS[name], {}

    def parse(argv: list[str]) -> list[str]:
        nonlocal options
        if parsing.HELP & set(argv):
            try:
                named = parsing.named_config(argv)
                print(help_of(name, argv[0], load_config(named) if named else None))
            except ValueError as error:
                sys.exit(f"{argv[0]}: {error}")
            sys.exit(0)
        try:
            options["config"], options["rest"] = parsing.parse(argv, command.interface)
            options["named"] = parsing.named_config(argv)
            command.check(options["config"], options["rest"])
        except ValueError as error:
            print(f"{argv[0]}: {error}", file=sys.stderr)
            sys.exit(1)
        return argv[:1]

    def run(argv: list[str]) -> None:
        del argv
        log_to_console()
        config, rest = options["config"], options["rest"]
        if rest.get("workdir") == "":
            stem = pathlib.Path(options["named"]).name
            rest["workdir"] = f"runs/{stem.replace('.py', '').replace(':', '_')}"
        command.call(config, rest)

    stopped = STOPPED if command.resumes else STOPPED_ANEW
    app.run(in_words(run, stopped), argv=argv, flags_parser=parse)


def help_of(name: str, me: str, config: Config | None = None) -> str:
    """Returns the text that --help prints, with the values of a config or the defaults."""
    command = COMMANDS[name]
    own = parsing.describe(command.interface)
    values = "its default" if config is None else "this config's value"
    return (
        f"{command.about.replace('{me}', me)}\n\n{own}\n  --config=NAME or PATH.py"
        f"{'':<8}a config to start from, with :VARIANT if need be\n"
        "  --debug                         show where an error was raised\n\n"
        f"Every leaf of a config, as --config.LEAF=VALUE, with {values}:\n\n"
        f"{reference.describe(config)}"
    )
