"""The import rules of the house, read from the source: a module imports only from lower levels and its underscore files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adaptkit
from adaptkit.detect import families, formats
from adaptkit.keymap import algorithms

PACKAGE = Path(adaptkit.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

LEVELS = {
    "errors": 0,
    "memory": 0,
    "names": 0,
    "registry": 0,
    "files": 1,
    "linalg": 1,
    "families": 2,
    "formats": 2,
    "algorithms": 2,
    "keymap": 3,
    "detect": 3,
    "adapter": 3,
    "checkpoint": 3,
    "unknown": 3,
    "suggest": 3,
    "policy": 3,
    "hosts": 4,
    "engine": 4,
    "ops": 5,
    "cli": 6,
}
# inside these packages modules build on one another in this order; everywhere else siblings never meet
CHAINS = {
    "files": ("header", "provenance", "pickles", "source", "quantized", "sink"),
    "linalg": ("precision", "krylov", "lowrank", "factored", "kron", "noise", "kronscan", "mixing"),
    "cli": ("options", "render", "*"),
}
CHAIN_L3 = ("keymap", "suggest", "policy", "detect", "unknown", "adapter", "checkpoint")
TORCH = {
    "linalg"
}  # everything else imports it inside functions: plans, dry runs and refusals never load it


def imports(path: Path, top_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _statements(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs on import: not function bodies, not `if TYPE_CHECKING`."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from ast.walk(node)


def parts(path: Path) -> tuple[str, str]:
    """(package or top module, module) below adaptkit/."""
    relative = path.relative_to(PACKAGE).with_suffix("")
    return (relative.parts[0], relative.parts[-1])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    home, module = parts(path)
    if home in ("__init__", "__main__"):
        return
    for name in imports(path):
        if not name.startswith("adaptkit."):
            continue
        other, *rest = name.split(".")[1:]
        if other not in LEVELS:
            continue  # a name of the package itself (`from adaptkit import __version__`)
        if other == home:
            _check_sibling(home, module, rest, name)
        elif LEVELS[other] == LEVELS[home] == 3:
            assert CHAIN_L3.index(other) < CHAIN_L3.index(home), f"{path.name} imports {name}"
        else:
            assert LEVELS[other] < LEVELS[home], (
                f"{path.name} (L{LEVELS[home]}) imports {name} (L{LEVELS[other]})"
            )


def _check_sibling(home: str, module: str, rest: list[str], name: str) -> None:
    if (
        not rest
        or rest[0].startswith("_")
        or rest[0] == module
        or module == "__init__"
        or home == module
    ):
        return
    if not (PACKAGE / home / f"{rest[0]}.py").exists():
        return  # a name out of __init__
    chain = CHAINS.get(home)
    assert chain is not None, f"{home}/{module}.py imports its sibling {name}"
    place = chain.index(module) if module in chain else chain.index("*")
    assert rest[0] in chain[:place], f"{home}/{module}.py imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_click_and_rich_stay_where_they_belong(path: Path) -> None:
    home, _ = parts(path)
    relative = path.relative_to(PACKAGE).as_posix()
    roots = {name.partition(".")[0] for name in imports(path, top_only=True)}
    if home not in TORCH and relative not in TORCH:
        assert "torch" not in roots, f"{relative} imports torch at module level"
    anywhere = {name.partition(".")[0] for name in imports(path)}
    if home != "cli":
        assert not anywhere & {"click", "rich"}, relative
    if "matplotlib" in anywhere:
        assert relative in ("cli/_picture.py", "cli/_plot.py", "cli/_curves.py"), relative
        assert "matplotlib" not in roots, (
            "matplotlib is an extra: it is imported when a picture is drawn"
        )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_function_is_annotated(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__init__":
            assert node.returns is not None, f"{path.name}:{node.lineno} {node.name}"


def test_registries_are_complete() -> None:
    for known, folder in (
        (families(), "families"),
        (formats(), "formats"),
        (algorithms(), "algorithms"),
    ):
        files = {p.stem for p in (PACKAGE / folder).glob("[!_]*.py")}
        assert {part.replace("-", "_") for name in known for part in name.split("+")} == files


def test_the_error_tree_is_as_its_docstring_draws_it() -> None:
    from adaptkit import errors

    for name in errors.__all__:
        assert name in (errors.__doc__ or "")
        assert issubclass(getattr(errors, name), errors.AdaptkitError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{tiny}/lora-kohya.safetensors", "{tiny}/base.ckpt"],
        ["families"],
        ["--help"],
        [
            "convert",
            "{tiny}/lora-kohya.safetensors",
            "--to",
            "comfy",
            "-o",
            "{out}/renamed.safetensors",
        ],
        ["convert", "{tiny}/lora-kohya.safetensors", "--to", "diffusers", "--dry-run"],
        ["resize", "{tiny}/lora-kohya.safetensors", "--size", "40KB", "--dry-run"],
        [
            "combine",
            "{tiny}/lora-kohya.safetensors",
            "{tiny}/lokr-kohya.safetensors:-1",
            "--rank",
            "2",
            "--dry-run",
        ],
        ["extract", "{tiny}/base.ckpt", "{tiny}/tuned.ckpt", "--dry-run"],
        ["merge", "{tiny}/base.ckpt", "{tiny}/lora-kohya.safetensors", "--dry-run"],
    ],
)
def test_torch_is_not_imported(arguments: list[str], tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom adaptkit.cli import main\n"
        f"sys.argv = ['adaptkit', *{[a.format(tiny=tiny, out=tmp_path) for a in arguments]!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'torch or numpy was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import sys, adaptkit\nassert 'torch' not in sys.modules and 'click' not in sys.modules\nadaptkit.Adapter, adaptkit.ops.inspect\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
