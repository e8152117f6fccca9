"""Checkpoints on the Hugging Face Hub, with a card made from their settings and reports (extra [hub])."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from robust.checkpoint import Checkpoint, CheckpointError, ball_facts, load
from robust.model import names_file
from robust.report import ROWS_FILE, Report
from robust.run_setup import CHECKPOINT

MARK = "hf:"
"""What a checkpoint's name begins with where it is one of the Hub, as in hf:user/name or hf:user/name@revision."""

FOLDER = Path("runs") / "hub"
"""Where such checkpoints are kept, and the results of evaluating them."""

REPORTS = ("certify", "attack")
"""Folders beside a checkpoint in which its evaluations are."""


class HubError(ValueError):
    """The Hub cannot be reached or refuses; one line."""


def local_checkpoint(name: Path) -> Path:
    """The file itself, or for hf:user/name the file that is downloaded, into `runs/hub/user/name`.

    What is downloaded is a safetensors file: loading it checks its hash and runs no code.

    Raises:
        HubError: no such repository or file, or no network.
    """
    text = str(name)
    if not text.startswith(MARK):
        return name
    repository, _, revision = text.removeprefix(MARK).partition("@")
    _check_name(repository, text)
    found = _asked(
        repository,
        lambda hub: hub.hf_hub_download(
            repository, CHECKPOINT, revision=revision or None, local_dir=str(FOLDER / repository)
        ),
    )
    return Path(found)


def push(
    path: Path,
    repository: str,
    reports: Sequence[Path] = (),
    private: bool = False,
    network: nn.Module | None = None,
) -> str:
    """Upload a checkpoint with its card and the rows of its reports; the address of the repository.

    Args:
        path: checkpoint of the suite, which is loaded first: a damaged one is refused.
        repository: user/name; made where it is absent.
        reports: folders of evaluations.
        network: the user's own, which the checkpoint is of; its file is not uploaded. See `load`.

    Raises:
        CheckpointError, ReportError: see `load` and `Report.load`. HubError: see `local_checkpoint`.
    """
    _check_name(repository, repository)
    checkpoint = load(path, network)
    loaded = {folder: Report.load(folder) for folder in reports}
    _refuse_other_checkpoints(checkpoint, loaded)
    with tempfile.TemporaryDirectory() as folder:
        content = Path(folder)
        shutil.copyfile(path, content / CHECKPOINT)
        (content / "README.md").write_text(card(checkpoint, repository, list(loaded.values())), encoding="utf-8")
        for report in loaded:
            (content / report.name).mkdir()
            shutil.copyfile(report / ROWS_FILE, content / report.name / ROWS_FILE)

        def upload(hub: Any) -> str:
            api = hub.HfApi()
            address = api.create_repo(repository, exist_ok=True, private=private)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Checkpoint and its evaluation")
            return str(address)

        return str(_asked(repository, upload))


def reports_beside(path: Path) -> list[Path]:
    """Folders of evaluations that lie beside a checkpoint."""
    return [path.parent / name for name in REPORTS if (path.parent / name / ROWS_FILE).exists()]


def card(checkpoint: Checkpoint, repository: str, reports: Sequence[Report]) -> str:
    """The model card, Markdown: what the network is, what was proved and attacked about it, and how to load it."""
    settings, ball = checkpoint.settings, ball_facts(checkpoint.ball)
    lines = ["---", "library_name: robust-suite", "pipeline_tag: image-classification", "tags:"]
    lines += ["- adversarial-robustness", "- certified-robustness", "---", "", f"# {repository.partition('/')[2]}", ""]
    shape, classes = "x".join(map(str, settings["input_shape"])), settings["classes"]
    lines += [
        f"`{settings['model']}` for images {shape} in [0, 1] and {classes} classes; its first layer normalises.",
        f"Threat model: {ball['norm']}, eps = {ball['eps']:.6g} in pixel units, pixel range {ball['pixel_range']}.",
        "",
    ]
    for report in reports:
        lines += _results(report)
    if not reports:
        lines += ["Nothing was measured on test images; the numbers below are from training.", ""]
    own = f" --model {settings['model']}" if names_file(settings["model"]) else ""
    lines += ["## Use", "", "```bash", f"robust certify {MARK}{repository}{own}", "```", ""]
    if own:
        file, _, name = settings["model"].partition(":")
        lines += [f"The network is the author's own: `{name}` of `{file}`, a file that is not part of this upload.", ""]
    if checkpoint.metrics:
        metrics = ", ".join(f"{name} {value:.2f}" for name, value in checkpoint.metrics.items())
        lines += ["## Training", "", f"Held-out images, in percent: {metrics}.", ""]
    lines += ["```json", json.dumps(settings, indent=2, ensure_ascii=False), "```", ""]
    return "\n".join(lines)


def _results(report: Report) -> list[str]:
    """A table of one evaluation; every rate with its 95 % interval."""
    header, rates = report.header, report.summary().rates
    method = header.get("verifier") or header.get("attack")
    ball = header["ball"]
    lines = [
        f"## {header.get('data', 'images')}, {ball['norm']}, eps = {ball['eps']:.6g}",
        "",
        f"Method: `{method}`.",
        "",
        "| accuracy | % | images | 95 % interval |",
        "|---|---|---|---|",
    ]
    for name in report.measured():
        rate = getattr(rates, name)
        low, high = (100 * end for end in rate.interval)
        words = {"under_attack": "under attack (upper bound of the robust one)"}.get(name, name)
        lines.append(
            f"| {words} | {100 * rate.fraction:.2f} | {rate.count} of {rate.total} | {low:.2f} to {high:.2f} |"
        )
    return [*lines, ""]


def _refuse_other_checkpoints(checkpoint: Checkpoint, reports: dict[Path, Report]) -> None:
    """A card must not show another network's numbers."""
    for folder, report in reports.items():
        told = report.header.get("checkpoint")
        if told is not None and told != checkpoint.hash():
            raise CheckpointError(f"{folder}: evaluates another checkpoint than the one to upload; evaluate it anew")


def _check_name(repository: str, text: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        raise HubError(f"{text}: expected user/name, the name of a repository on the Hugging Face Hub")


def _asked(repository: str, request: Any) -> Any:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise HubError("huggingface_hub is not installed; pip install 'robust-suite[hub]'") from None
    errors = importlib.import_module("huggingface_hub.errors")
    # Versions of the client build on different HTTP packages; its own error inherits from the package's, which those
    # of an unplugged network or an unknown host are, too.
    http_errors = errors.HfHubHTTPError.__bases__
    try:
        return request(hub)
    except (*http_errors, errors.LocalEntryNotFoundError, OSError, RuntimeError) as error:
        # The client says of a large file only that its upload failed; why stands behind it.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = " ".join(str(cause).split())[:200]
        response = getattr(error, "response", None)
        advice = ""
        if getattr(response, "status_code", None) in (401, 403):
            advice = "; for a private repository or an upload: `hf auth login`, or $HF_TOKEN"
        elif response is None and isinstance(error, http_errors) and getattr(error, "errno", None) is None:
            advice = "; is there a network, and does it need $HTTPS_PROXY? Then the same command again"
        raise HubError(f"{repository}: the Hugging Face Hub gave no answer that helps ({reason}){advice}") from None
