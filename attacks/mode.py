"""The state a model is in while it is attacked, and its return to the state it was in before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.constant_convolution import faster_input_gradients

Model = Callable[[Tensor], Tensor]
"""Anything that maps inputs [B, ...] to logits [B, K]; often an nn.Module."""

Mode = Literal["eval", "train", "train_frozen", "keep"]
"""eval: running statistics. train: batch statistics, which also move the running ones. train_frozen: batch
statistics, running ones untouched. keep: the model as it is."""


@contextmanager
def attack_mode(model: Model, mode: Mode = "eval") -> Iterator[None]:
    """Put the model in `mode`, with gradients flowing to the input alone.

    Training flags (of each sub-module by itself, so that a frozen normalisation layer stays frozen),
    `requires_grad` flags and the bookkeeping of running statistics are restored on the way out, also after an
    exception. A plain callable has no such state.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("an attack needs gradients: call it outside torch.inference_mode (torch.no_grad is fine)")
    if not isinstance(model, nn.Module):
        yield
        return
    flags = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tracked = [(m, m.track_running_stats, m.momentum) for m in model.modules() if hasattr(m, "track_running_stats")]
    try:
        _set_mode(model, mode)
        for parameter in trainable:
            parameter.requires_grad_(False)
        with faster_input_gradients(model):
            yield
    finally:
        # Attributes are set directly: `module.train(flag)` would overwrite the flags of its children.
        for module, training in flags:
            module.training = training
        for norm, tracking, momentum in tracked:
            norm.track_running_stats, norm.momentum = tracking, momentum
        for parameter in trainable:
            parameter.requires_grad_(True)


def _set_mode(model: nn.Module, mode: Mode) -> None:
    if mode not in ("eval", "train", "train_frozen", "keep"):
        raise ValueError(f"expected mode eval, train, train_frozen or keep, got {mode!r}")
    if mode == "keep":
        return
    for module in model.modules():
        module.training = mode != "eval"
        if mode == "train_frozen" and hasattr(module, "track_running_stats"):
            # Batch norm then neither reads nor moves its running statistics; instance norm moves them by nothing.
            module.track_running_stats, module.momentum = False, 0.0  # type: ignore[assignment]
