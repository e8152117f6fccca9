"""Packaging of the suite: three import packages (attacks, certify, robust) and one command (robust)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="robust-suite",
    version="0.1.0",
    description="Certified-robustness and adversarial training, attacks and verification for PyTorch image classifiers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["attacks*", "certify*", "robust*"]),
    package_data={"robust": ["recipes/*.toml", "py.typed"], "attacks": ["py.typed"], "certify": ["py.typed"]},
    install_requires=[
        "torch>=2.4",
        "torchvision",
        "numpy",
        "tqdm",
        "safetensors",
        "matplotlib",
        "scikit-learn",
    ],
    extras_require={
        "tensorboard": ["tensorboard"],
        "sweep": ["optuna"],
        "onnx": ["onnx", "onnxruntime"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "tensorboard",
            "optuna",
            "onnx",
            "onnxruntime",
            "onnxscript",  # which torch.onnx.export needs
        ],
        "foolbox": ["foolbox"],
        "hub": ["huggingface_hub"],
        "docs": ["pdoc>=15"],
        # The bound keeps resolvers from an older release without the pin on requests 2.25 that this one has.
        "torchattacks": ["torchattacks>=3.5.1"],
    },
    entry_points={"console_scripts": ["robust = robust.cli:main"]},
)
