"""What an evaluation command is asked about: a checkpoint, images and a threat model."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from attacks.threat import Ball, make_ball
from robust.checkpoint import Checkpoint, CheckpointError, load, load_state_dict_file
from robust.dataset import DataSet, parse_dataset
from robust.flags import count, number_of
from robust.hub import local_checkpoint
from robust.images import Images
from robust.layout import LAYOUTS
from robust.model import names_file
from robust.own_model import code_hash, model_for, own_network
from robust.tensor_file import written_here


def add_problem(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint or hf:user/name, or with --model a plain state dict")
    parser.add_argument("--data", help="data set (default: the one that the checkpoint was trained on)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which images (default: test)")
    parser.add_argument("--eps", help="radius in pixel units, such as 8/255 (default: the checkpoint's)")
    parser.add_argument("--norm", help="linf, l2 or l1 (default: the checkpoint's)")
    parser.add_argument(
        "--model",
        help="architecture of a plain state dict, or your own network as FILE.py:NAME, which is run",
    )
    parser.add_argument("--layout", help="project that wrote a plain state dict (default: found by its names)")
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N images")


def problem(options: argparse.Namespace) -> tuple[Checkpoint, DataSet, Ball]:
    """Checkpoint, data and threat model that an evaluation command names; a checkpoint of the Hub is now a file."""
    _check_layout(options)
    options.checkpoint = local_checkpoint(options.checkpoint)
    own = options.model is not None and names_file(options.model) and written_here(options.checkpoint)
    if options.model is None or own:
        checkpoint = load(options.checkpoint, own_network(options.model) if own else None)
        if own:
            checkpoint = dataclasses.replace(checkpoint, code=code_hash(options.model))
        if options.data is None and "data" not in checkpoint.settings:
            raise CheckpointError(f"{options.checkpoint}: does not say which data set it was trained on; give --data")
        data = parse_dataset(options.data or checkpoint.settings["data"])(options.root)
        _refuse_other_images(checkpoint, data)
        return checkpoint, data, _ball(options, checkpoint.ball)
    missing = [flag for flag in ("data", "eps") if getattr(options, flag) is None]
    if missing:
        raise CheckpointError(f"{options.checkpoint}: a plain state dict also needs --{' and --'.join(missing)}")
    data = parse_dataset(options.data)(options.root)
    model = model_for(options.model, data)
    load_state_dict_file(options.checkpoint, model, options.layout)
    ball = make_ball(options.norm or "linf", number_of("--eps", options.eps))
    facts = {"model": options.model, "data": options.data, "input_shape": list(data.input_shape)}
    facts.update(classes=len(data.classes), mean=list(data.mean), std=list(data.std))
    return Checkpoint(model.eval(), facts, ball, code=code_hash(options.model)), data, ball


def _check_layout(options: argparse.Namespace) -> None:
    """UnknownName where --layout names none, ValueError where there are no names of another project to read by it."""
    if options.layout is None:
        return
    LAYOUTS.parse(options.layout)
    if options.model is None or names_file(options.model):
        raise ValueError(
            f"--layout {options.layout}: is for the state dict of another project, whose architecture --model names; "
            "a checkpoint of this suite and your own network need none"
        )


def images_of(options: argparse.Namespace, data: DataSet) -> Images:
    """The part of the data set that --split names; ValueError where it has no images."""
    images = data.test if options.split == "test" else data.train
    if not len(images):
        raise ValueError(f"{data.name} has no images in its part {options.split!r}; choose the other --split")
    return images


def _ball(options: argparse.Namespace, trained: Ball) -> Ball:
    """The checkpoint's threat model, changed by --norm and --eps."""
    norm = options.norm or trained.norm
    if options.eps is not None:
        return make_ball(norm, number_of("--eps", options.eps), trained.pixel_range)
    if norm != trained.norm:
        raise ValueError(
            f"--norm {norm} also needs --eps: the checkpoint's {float(trained.eps):g} is a radius in {trained.norm}"
        )
    return trained


def _refuse_other_images(checkpoint: Checkpoint, data: DataSet) -> None:
    """ValueError where the model was made for images of another size or for fewer classes."""
    settings = checkpoint.settings
    shape, classes = tuple(settings["input_shape"]), settings["classes"]
    if shape != tuple(data.input_shape) or classes < len(data.classes):
        raise ValueError(
            f"the model takes images {'x'.join(map(str, shape))} of {classes} classes, but {data.name} has "
            f"{'x'.join(map(str, data.input_shape))} of {len(data.classes)}; give another --data"
        )
