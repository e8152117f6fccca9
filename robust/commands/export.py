"""`robust export`: a checkpoint as an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from certify.formats.onnx_export import export_onnx
from robust.checkpoint import load
from robust.flags import add_json, add_own_network
from robust.hub import local_checkpoint
from robust.own_model import own_network
from robust.plain import plain

WORDS = "write a checkpoint's network as an ONNX file"
EXAMPLES = """examples:
  robust export runs/digits_sabr/checkpoint.safetensors model.onnx

Pixels in [0, 1] to logits, normalisation included, for any number of images. onnxruntime confirms the file."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint, or hf:user/name")
    parser.add_argument("onnx", type=Path, help="file to write")
    add_own_network(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    own = None if options.model is None else own_network(options.model)
    checkpoint = load(local_checkpoint(options.checkpoint), own)
    channels, height, width = checkpoint.settings["input_shape"]
    difference = export_onnx(plain(checkpoint.model), (channels, height, width), options.onnx)
    print(f"{options.onnx}: logits within {difference:.1e} of the checkpoint's")
    return {"onnx": str(options.onnx), "difference": difference}
