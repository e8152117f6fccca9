"""The README as a newcomer reads it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from robust.cli import main
from robust.listing import KINDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE_KINDS = {
    "objective": "objectives",
    "attack": "attacks",
    "verifier": "verifiers",
    "regulariser": "regularizers",
    "weighting": "weightings",
    "perturbation": "weight_perturbations",
    "hook": "hooks",
}


def test_the_library_example_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    example = re.findall(r"```python\n(.*?)```", README.split("## Certify your own model")[1], flags=re.DOTALL)[0]
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "certified" in printed
    assert "torch.Size([4, 9])" in printed


def test_every_registered_method_of_the_tabulated_kinds_is_in_the_table() -> None:
    listed: dict[str, set[str]] = {}
    kind = ""
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6 and cells[2].startswith("`"):
            kind = cells[1] or kind
            listed.setdefault(kind, set()).update(re.findall(r"`([^`]+)`", cells[2]))
    for word, name in TABLE_KINDS.items():
        assert listed[word] == set(KINDS[name].names())


@pytest.mark.parametrize(
    "line", re.findall(r"^robust (train|certify|attack) (.*?)(?:  +#.*)?$", README, flags=re.MULTILINE)
)
def test_command_lines_in_the_readme_have_known_flags_only(
    line: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command, rest = line
    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = capsys.readouterr().out
    for flag in re.findall(r"--[a-z-]+", rest):
        assert flag in known


def test_the_messages_of_the_troubleshooting_table_are_those_of_the_code() -> None:
    (table,) = re.findall(r"## When something goes wrong\n(.*?)\n## ", README, flags=re.DOTALL)
    messages = re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)
    sources = "".join(
        path.read_text("utf-8") for name in ("attacks", "certify", "robust") for path in (ROOT / name).rglob("*.py")
    )
    assert len(messages) >= 8
    for message in messages:
        assert all(part.strip() in sources for part in message.split("...")), message
