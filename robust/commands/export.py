"""`robust export`: a checkpoint as an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

from certify.formats.onnx_export import export_onnx
from robust.checkpoint import load
from robust.hub import local_checkpoint
from robust.plain import plain

WORDS = "write a checkpoint's network as an ONNX file"
EXAMPLES = """examples:
  robust export runs/digits_sabr/checkpoint.safetensors model.onnx

Pixels in [0, 1] to logits, normalisation included, for any number of images. onnxruntime confirms the file."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint, or hf:user/name")
    parser.add_argument("onnx", type=Path, help="file to write")


def run(options: argparse.Namespace) -> None:
    checkpoint = load(local_checkpoint(options.checkpoint))
    channels, height, width = checkpoint.settings["input_shape"]
    difference = export_onnx(plain(checkpoint.model), (channels, height, width), options.onnx)
    print(f"{options.onnx}: logits within {difference:.1e} of the checkpoint's")
