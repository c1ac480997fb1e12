"""Packaging of the two packages, the console script and the extras."""

from pathlib import Path

from setuptools import find_packages, setup

EVAL = ["lm_eval>=0.4.13"]
NOTEBOOKS = ["jupyter"]
RIVAL = ["libgguf>=0.2.2", "xllamacpp>=2026.10"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"]
DEV = [
    "hypothesis",
    "import-linter>=2.6",
    "ipykernel",
    "mutmut==3.8.1",
    "mypy",
    "nbclient",
    "nbformat",
    "pytest",
    "pytest-xdist>=3.6",
    "pyyaml",
    "ruff",
    "tiktoken",
    *DOCS,
    *EVAL,
    *RIVAL,
]

setup(
    name="short-gpt",
    version="0.1.0",
    description="Find the redundant layers of a large language model, remove them, use the rest.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["short_gpt", "short_gpt.*", "llama", "llama.*"]),
    package_data={
        "short_gpt": ["py.typed"],
        "short_gpt.data": ["prompts.txt"],
        "short_gpt.evaluation": ["questions.jsonl"],
        "short_gpt.jobs": ["page.html", "published.json"],
        "llama": ["py.typed"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.5",
        "numpy",
        "scipy>=1.11",
        "fairscale>=0.4.13",
        "fire>=0.6",
        "sentencepiece>=0.1.99",
        "tokenizers>=0.19",
        "safetensors>=0.4",
        "transformers>=4.57.1",
        "accelerate",
        "peft>=0.18",
        "gguf>=0.17",
        "huggingface_hub>=0.24",
        "datasets>=3",
        "pyarrow>=15",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "platformdirs>=4",
        "psutil>=5.9",
        "tqdm",
    ],
    extras_require={
        "eval": EVAL,
        "rival": RIVAL,
        "notebooks": NOTEBOOKS,
        "docs": DOCS,
        "dev": DEV,
        "all": [*NOTEBOOKS, *DEV],
    },
    entry_points={"console_scripts": ["short-gpt = short_gpt.cli.app:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
