"""A user's own network, named by the file that defines it: `--model my_net.py:MyNet`.

The file's code runs, and it runs only because the user names it on the command line; what a checkpoint's settings say
is never run. The weights still come from a state dict that is loaded without running its code.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from certify.verdict import logits_of
from robust.dataset import DataSet
from robust.model import MODELS, names_file


class OwnModelError(ValueError):
    """A file, a name in it or a network that cannot be used; the message is one line."""


def check_named(text: str) -> None:
    """OwnModelError where the text names no file, or no network in it; nothing is run."""
    file, _, name = text.partition(":")
    if not Path(file).is_file():
        raise OwnModelError(f"--model: there is no file {file} (looked for {Path(file).resolve()})")
    if not name:
        raise OwnModelError(f"--model {text}: which network? write --model {file}:NAME")


def own_network(text: str) -> nn.Module:
    """The user's network.

    Raises:
        OwnModelError: the text names no file of Python, or there is no such file or name in it, or its code fails.
    """
    if not names_file(text):
        raise OwnModelError(f"--model {text}: expected your own network, FILE.py:NAME; a checkpoint names any other")
    return _build(text)


def code_hash(text: str) -> str | None:
    """SHA-256 of the user's own file that a model's text names, by which an edited one is noticed; None for others.

    What the file imports is not in it.
    """
    return hashlib.sha256(Path(text.partition(":")[0]).read_bytes()).hexdigest() if names_file(text) else None


def own_among(trained: str, given: Sequence[str]) -> str | None:
    """Which of the networks that the user gives is the one that a checkpoint names; None where none is.

    The same text, or else the one text with the same NAME in a file of the same name, in whatever folder it is now.
    """
    if trained in given:
        return trained
    alike = [text for text in given if _without_folder(text) == _without_folder(trained)]
    return alike[0] if len(alike) == 1 else None


def _without_folder(text: str) -> tuple[str, str]:
    file, _, name = text.partition(":")
    return Path(file).name, name


def model_for(text: str, data: DataSet) -> nn.Module:
    """Network with fresh weights: the user's own, or the registered architecture made for the data set.

    Raises:
        OwnModelError: no such file or name, code that fails, or a network that does not take the data set's images.
        UnknownName: no such architecture.
    """
    if not names_file(text):
        return MODELS.parse(text)(data.input_shape, len(data.classes), data.mean, data.std)
    model = _build(text)
    _check_fits(model, text, data)
    return model


def _build(text: str) -> nn.Module:
    """What NAME in FILE.py makes without arguments: a class, a function, or a network that is already there."""
    with _running(Path(text.partition(":")[0])):
        return _made(text)


def _made(text: str) -> nn.Module:
    file, _, name = text.partition(":")
    module = _imported(Path(file))
    made_here = [
        word
        for word, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    ]
    known = f"{file} defines {', '.join(made_here) or 'no class of nn.Module'}"
    if not name:
        raise OwnModelError(
            f"--model {text}: which network? {known}; write --model {file}:{(made_here or ['NAME'])[0]}"
        )
    if not hasattr(module, name):
        raise OwnModelError(f"--model {text}: no {name!r} in the file; {known}")
    found = getattr(module, name)
    try:
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:  # the user's code: whatever it raises is for the user to read
        raise OwnModelError(
            f"--model {text}: {name}() fails ({_first_line(error)}); name a class or a function that needs no "
            f"arguments, such as def net(): return {name}(...)"
        ) from error
    if not isinstance(model, nn.Module):
        raise OwnModelError(f"--model {text}: {name}() gives {type(model).__name__}, expected a torch.nn.Module")
    return model


@contextlib.contextmanager
def _running(path: Path) -> Iterator[None]:
    """Context for the user's code: as a script it can import what lies beside it, but it cannot end the command."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    except SystemExit as error:
        raise OwnModelError(
            f"--model: {path} would end the command ({_first_line(error)}); put what it does as a script, such as "
            'reading arguments, under if __name__ == "__main__":'
        ) from error
    finally:
        sys.path.remove(folder)


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        raise OwnModelError(f"--model: there is no file {path} (looked for {path.resolve()})")
    # Its own name, my_net, may be that of another module.
    name = f"own_network_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for the names in their annotations
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise OwnModelError(f"--model: {path} cannot be imported: {_first_line(error)}") from error
    return module


def _check_fits(model: nn.Module, text: str, data: DataSet) -> None:
    """OwnModelError where the network does not map images of the data set to a logit for each class."""
    images = f"images {'x'.join(map(str, data.input_shape))} of {data.name}"
    try:
        logits = logits_of(model, torch.zeros(2, *data.input_shape))
    except Exception as error:  # the user's code
        raise OwnModelError(
            f"--model {text} does not take the {images} ({_first_line(error)}); another size or channels=1: "
            "folder:path=DIR,size=32,channels=1"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape[:1] != (2,) or logits.dim() != 2:
        shape = f"shape {list(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise OwnModelError(f"--model {text}: expected logits [2, classes] for two {images}, got {shape}")
    if logits.shape[1] < len(data.classes):
        raise OwnModelError(
            f"--model {text} has {logits.shape[1]} logits, but {data.name} has {len(data.classes)} classes; give "
            "another --data"
        )
    try:
        logits_of(model, torch.zeros(3, *data.input_shape))
    except Exception as error:
        raise OwnModelError(
            f"--model {text} takes two {images}, but not three ({_first_line(error)}); its forward must take "
            "batches of any size"
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
