"""Imports point one way, and importing costs nothing that it should not."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import robust

ROOT = Path(robust.__file__).parents[1]
MAY_IMPORT = {
    "attacks": {"attacks"},
    "certify": {"attacks", "certify"},
    "robust": {"attacks", "certify", "robust"},
    "scripts": {"attacks", "certify", "robust", "scripts"},
}
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
SAYS_NOTHING = {"utils", "util", "common", "misc", "helpers", "helper", "tools", "base", "core"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, package: str) -> Iterator[tuple[ast.stmt, str]]:
    """(statement, dotted name) of everything a file imports, wherever the statement stands.

    `from a import b` gives "a.b": b may be a module. Text handed to import_module and __import__ counts too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            front = ".".join([*inside, *([node.module] if node.module else [])])
            yield from ((node, f"{front}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Expr | ast.Assign | ast.Return) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func).rpartition(".")[2]
            first = node.value.args[0] if node.value.args else None
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node, str(first.value)


def parsed(path: Path) -> tuple[ast.Module, str]:
    return ast.parse(path.read_text(encoding="utf-8")), ".".join(path.relative_to(ROOT).parent.parts)


def wrong_arrows(tree: ast.AST, package: str) -> list[str]:
    allowed = MAY_IMPORT[package.split(".")[0]]
    ours = [(node.lineno, name) for node, name in imports(tree, package) if name.split(".")[0] in MAY_IMPORT]
    return [f"line {line}: {name}" for line, name in ours if name.split(".")[0] not in allowed]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_arrow_points_left(path: Path) -> None:
    assert wrong_arrows(*parsed(path)) == []


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("attacks.methods", "from certify.graph import capture"),
        ("attacks", "import robust"),
        ("certify", "def f():\n    from robust import Settings"),
        ("certify.bounds", "if 1:\n    import scripts.bench as b"),
        ("certify", "x = importlib.import_module('robust.cli')"),
        ("robust.data", "from scripts import reproduce"),
    ],
)
def test_an_arrow_that_points_left_is_found(package: str, line: str) -> None:
    assert len(wrong_arrows(ast.parse(line), package)) == 1
    assert wrong_arrows(ast.parse("from attacks.threat import Ball\nimport torch, robustness"), package) == []


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=name_of)
def test_an_init_file_is_a_table_of_contents(path: Path) -> None:
    """Docstring, imports of our own names, and `__all__`, which lists exactly these names; `robust` has a start."""
    tree, _ = parsed(path)
    listed, imported = [], []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            imported += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            listed = ast.literal_eval(node.value)
        elif isinstance(node, ast.Import):
            assert path.parent.name == "robust" and ast.unparse(node) == "import robust.start"
        else:
            assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), ast.unparse(node)
    assert sorted(listed) == sorted(imported)


def test_every_package_has_an_init_file_and_every_name_says_something() -> None:
    for path in FILES:
        assert not {part.removesuffix(".py") for part in path.relative_to(ROOT).parts} & SAYS_NOTHING, path
        if path.relative_to(ROOT).parts[0] != "scripts":
            assert (path.parent / "__init__.py").exists(), path


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_siblings_and_not_its_own_packages_table_of_contents(path: Path) -> None:
    tree, package = parsed(path)
    if path.name == "__init__.py":
        return
    top = package.split(".")[0]
    for node, name in imports(tree, package):
        if name.split(".")[0] == top and top != "scripts":
            assert "." in name and _is_found_in_a_file(name), f"line {node.lineno}: {name}"


def _is_found_in_a_file(name: str) -> bool:
    """Whether `a.b.c` is a module or a package, or a name inside the module a/b.py, and not one that a/b/__init__.py
    passes on."""
    path = ROOT / Path(*name.split("."))
    return (
        path.with_suffix(".py").exists() or (path / "__init__.py").exists() or path.parent.with_suffix(".py").exists()
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_optional_and_fragile_packages_are_imported_where_they_are_used(path: Path) -> None:
    """A torchvision built for another torch fails at import, and extras may be absent."""
    tree, package = parsed(path)
    late = {
        "torchvision",
        "tensorboard",
        "wandb",
        "optuna",
        "onnx",
        "onnxruntime",
        "torchattacks",
        "auto_LiRPA",
        "foolbox",
        "robustbench",
        "timm",
        "huggingface_hub",
        "highspy",
    }
    if name_of(path) == "robust/torchvision_source.py":
        late -= {"torchvision"}
    top_level = {
        name.split(".")[0]
        for node in tree.body
        for _, name in imports(node, package)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert not top_level & late


def loaded_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(' '.join(name for name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_attacks_and_certify_stand_alone() -> None:
    loaded = loaded_after("import attacks, certify; certify.VERIFIERS.names(); attacks.ATTACKS.names()")
    assert not {name for name in loaded if name.split(".")[0] in ("robust", "scripts", "torchvision")}


def test_the_command_line_starts_without_torchvision_and_tensorboard() -> None:
    loaded = loaded_after("import robust.cli; robust.cli.command_parser()")
    assert not {name for name in loaded if name.split(".")[0] in ("torchvision", "tensorboard", "sklearn", "scripts")}
