"""Tests for dmpo_jax/diffusers_io/schedules.py: a config read as diffusers reads it."""

import contextlib
import json

import diffusers
import pytest

from dmpo_jax import diffusers_io
from dmpo_jax.diffusion.samplers import SAMPLERS

# diffusers' own: it makes NumPy arrays of tensors by a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DDPM = [name for name, solver in SAMPLERS.items() if solver.noise == "ddpm"]
CLASSES = {name: solver.scheduler for name, solver in SAMPLERS.items()}
XL = {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}
CONFIGS = {
    "euler_xl": {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, **XL},
    "euler_bare": {"_class_name": "EulerDiscreteScheduler"},
    "euler_offset": {"_class_name": "EulerDiscreteScheduler", "steps_offset": 0},
    "ddim_bare": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "dpm": {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1, **XL},
    "dpm_sigma_min": {
        "_class_name": "DPMSolverMultistepScheduler",
        "euler_at_final": True,
        "final_sigmas_type": "sigma_min",
    },
    # as StabilityAI and runwayml write it
    "pndm": {
        "_class_name": "PNDMScheduler",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "ancestral": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "unipc": {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "solver_order": 2},
}


def write(folder, config, kind=None):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    if kind:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


@pytest.mark.parametrize("sampler", DDPM)
@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_those_that_diffusers_makes_of_the_config(tmp_path, name, sampler):
    config = CONFIGS[name]
    write(tmp_path, config)
    own = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path / "scheduler")
    theirs = getattr(diffusers, CLASSES[sampler]).from_config(own.config)
    got = diffusers_io.load_schedule(tmp_path)[1].settings(sampler)
    want = {key: theirs.config[key] for key in got}
    if sampler == "ddim" and "clip_sample" not in config:
        want["clip_sample"] = False  # the one departure: True would cut every latent
    assert got == want


@pytest.mark.parametrize("name", ["euler_bare", "euler_offset", "euler_xl", "ddim_bare"])
def test_what_a_pipeline_overrides_is_overridden(tmp_path, name):
    """StableDiffusionPipeline, when it is made, sets some of its scheduler's values right."""
    config = CONFIGS[name]
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    with (
        pytest.warns(FutureWarning) if config.get("steps_offset") != 1 else contextlib.nullcontext()
    ):
        pipe = diffusers.StableDiffusionPipeline(
            *[None] * 4, scheduler, None, None, requires_safety_checker=False
        )
    write(tmp_path, config, "StableDiffusionPipeline")
    sampling = diffusers_io.load_schedule(tmp_path)[1]
    got = sampling.settings(sampling.name)
    assert got == {key: pipe.scheduler.config[key] for key in got}
    other = {"euler": "dpmpp_2m"}.get(sampling.name, "euler")
    theirs = getattr(diffusers, CLASSES[other]).from_config(pipe.scheduler.config)
    got = sampling.settings(other)
    assert got == {key: theirs.config[key] for key in got}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_defaults_are_diffusers(sampler):
    theirs = getattr(diffusers, CLASSES[sampler])().config
    solver = SAMPLERS[sampler]
    ours = solver.defaults | {k: v[0] for k, v in solver.only({}).items()}
    departures = {"clip_sample": True} if sampler == "ddim" else {}
    assert {key: theirs[key] for key in ours} == ours | departures


def test_a_stand_in_is_named_once_it_is_used(tmp_path, caplog):
    for name, want in (("pndm", "ddim"), ("ancestral", "euler"), ("unipc", "ddim")):
        caplog.clear()
        _, sampling = diffusers_io.load_schedule(write(tmp_path, CONFIGS[name]))
        assert not caplog.records  # training has no use for it
        assert sampling.resolve("dpmpp_2m") == "dpmpp_2m"
        assert sampling.resolve() == want
        assert caplog.text.count(f"{CONFIGS[name]['_class_name']}; {want}") == 1
    caplog.clear()
    assert diffusers_io.load_schedule(write(tmp_path, CONFIGS["euler_xl"]))[1].resolve() == "euler"
    assert not caplog.records


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_a_few_step_model_is_sampled_by_another_algorithm_only_if_asked(tmp_path, name):
    _, sampling = diffusers_io.load_schedule(write(tmp_path, {"_class_name": name}))
    with pytest.raises(ValueError, match=f"{name}.*Choose one of ddim.*--config.sample.sampler"):
        sampling.resolve()
    assert sampling.resolve("euler") == "euler"


@pytest.mark.parametrize("key", ["prediction_type", "beta_schedule"])
def test_what_is_wrong_with_the_noise_names_the_file(tmp_path, key):
    with pytest.raises(
        ValueError,
        match=rf"scheduler_config\.json describes no noise: {key} must be one of .*'odd'",
    ):
        diffusers_io.load_schedule(write(tmp_path, {key: "odd"}))


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"thresholding": True}, {"ddim", "dpmpp_2m"}),
        ({"algorithm_type": "sde-dpmsolver++"}, {"dpmpp_2m"}),
        ({"solver_order": 3}, {"dpmpp_2m"}),
        ({"solver_type": "heun"}, {"dpmpp_2m"}),
        ({"use_lu_lambdas": True}, {"dpmpp_2m"}),
        ({"lambda_min_clipped": -5.1}, {"dpmpp_2m"}),
        ({"use_exponential_sigmas": True}, {"euler", "dpmpp_2m"}),
        ({"use_beta_sigmas": True}, {"euler", "dpmpp_2m"}),
        ({"interpolation_type": "log_linear"}, {"euler"}),
        ({"timestep_type": "continuous", "prediction_type": "v_prediction"}, {"euler"}),
        ({"timestep_type": "continuous"}, set()),
        ({"sigma_max": 80.0, "use_karras_sigmas": True}, {"euler"}),
        ({"sigma_max": 80.0}, set()),
        ({"lambda_min_clipped": None, "use_flow_sigmas": None}, set()),
    ],
)
def test_what_would_change_the_sampler_is_refused_by_name(tmp_path, config, refused):
    schedule, sampling = diffusers_io.load_schedule(write(tmp_path, config))  # training goes on
    assert schedule.num_train_timesteps == 1000
    for sampler in DDPM:
        if sampler in refused:
            key, value = next(iter(config.items()))
            with pytest.raises(ValueError, match=rf"scheduler_config\.json asks for {key}=") as e:
                sampling.settings(sampler)
            assert repr(value) in str(e.value)
        else:
            sampling.settings(sampler)
    with pytest.raises(ValueError, match=r"auto or one of \['ddim', .*got 'heun'"):
        sampling.settings("heun")


def test_the_noise_is_read_or_refused(tmp_path):
    config = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    schedule, _ = diffusers_io.load_schedule(write(tmp_path, config))
    assert (schedule.num_train_timesteps, schedule.prediction_type) == (1000, "v_prediction")
    with pytest.raises(ValueError, match="EDMEulerScheduler, whose noise is not"):
        diffusers_io.load_schedule(write(tmp_path, {"_class_name": "EDMEulerScheduler"}))
