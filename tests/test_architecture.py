"""The rules of the house, read from the source: who may import whom, and how large things get."""

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

# from the ground up; a module imports only from floors below its own
FLOORS = (
    ("errors", "names", "process", "registry"),
    ("files", "linalg"),
    ("families", "formats", "algorithms"),
    (
        "keymap",
        "suggest",
        "detect",
        "unknown",
        "meaning",
        "entries",
        "adapter",
        "respelling",
        "checkpoint",
    ),
    ("steps", "staging", "engine", "hosts"),
    ("ops",),
    ("api",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
# on these floors, and inside these packages, each module may also use those named before it
CHAINS = {
    "": (*FLOORS[0], *FLOORS[3], *FLOORS[4]),
    "files": (
        "limits", "dtypes", "header", "provenance", "pickled", "packing", "gguf", "tensors", "reader", "source", "packed", "arranged", "open", "hub",
        "quantized", "_exchange", "leftovers", "publish", "output_file", "sink", "spool",
    ),
    "linalg": (
        "precision", "split", "krylov", "hosted", "stacks", "lowrank", "factored", "noise", "kron", "products",
        "looks", "mixing", "fused",
    ),
    "keymap": ("patterns", "templates", "roles", "kinds", "rows", "adapter_keys", "checkpoint_keys"),
    "ops": ("stages", "verb", "shared", "finding", "blocks", "selecting", "block_weights", "adapter_file", "ranks", "difference", "rewrite", "*"),
    "api": ("inputs", "adapters", "*"),
    "cli": ("show", "values", "options", "*"),
}  # fmt: skip
TABLES = ("families", "formats", "algorithms", "hosts")  # one file for each member
MOST_FILES, MOST_LINES, WIDEST, P90 = 15, 450, 100, 20
TORCH = {
    "linalg"
}  # everything else imports it inside functions: plans, dry runs and refusals never load it


def imports(path: Path, top_only: bool = False) -> Iterator[str]:
    """The modules a file imports; those it names only for type checkers too, unless `top_only`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _statements(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (_module(node.module, alias.name) for alias in node.names)


def _module(package: str, name: str) -> str:
    """`from adaptkit.ops import merge` means the module; `from adaptkit.names import Slot` does not."""
    whole = PACKAGE.parent / package.replace(".", "/") / name
    return f"{package}.{name}" if whole.with_suffix(".py").exists() or whole.is_dir() else package


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs on import: not function bodies, not `if TYPE_CHECKING`."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from ast.walk(node)


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def place(home: str, name: str) -> int:
    chain = CHAINS[home]
    return chain.index(name) if name in chain else chain.index("*") if "*" in chain else -1


def wrong(module: str, imported: str) -> str | None:
    """Why a module may not import another of the package; None if it may."""
    here, there = module.split(".")[1:], imported.split(".")[1:]
    if not here or not there or here[0] == "__main__":
        return None
    if here[0] != there[0]:
        one, other = LEVEL[here[0]], LEVEL[there[0]]
        beside = one == other and place("", there[0]) < place("", here[0])
        return None if other < one or beside else f"L{one} imports from L{other}"
    if len(here) < 2 or len(there) < 2 or here[1] == there[1]:
        return None  # the package itself, and what lies inside one folder of it
    if here[0] in TABLES:
        shared = there[1].startswith("_") or there[1] == "contract"
        return None if shared else "members of a table never import each other"
    if here[0] not in CHAINS:
        return None
    one, other = place(here[0], here[1]), place(here[0], there[1])
    return None if other < one else "a sibling on the same floor, or above"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_down(path: Path) -> None:
    for name in imports(path):
        if name.split(".")[0] == "adaptkit":
            assert wrong(dotted(path), name) is None, (
                f"{relative(path)}: {name}: {wrong(dotted(path), name)}"
            )


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("adaptkit.files.header", "adaptkit.linalg.kron.blocks"),
        ("adaptkit.ops.merge.run", "adaptkit.ops.extract.fit"),
        ("adaptkit.ops.ranks.forms", "adaptkit.ops.extract.fit"),
        ("adaptkit.ops.batch.workers", "adaptkit.ops.merge"),
        ("adaptkit.ops.resize", "adaptkit.ops.convert"),
        ("adaptkit.families.flux", "adaptkit.families.sdxl"),
        ("adaptkit.keymap", "adaptkit.detect"),
        ("adaptkit.linalg.precision", "adaptkit.linalg.kron.blocks"),
        ("adaptkit.ops.shared", "adaptkit.cli.options"),
    ],
)
def test_the_rules_refuse(module: str, imported: str) -> None:
    assert wrong(module, imported)


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """A path that comes back to where it began; None if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph.get(name, ())):
            if (found := visit(other, [*path, name])) is not None:
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := visit(name, []))), None)


def test_no_circle_of_imports() -> None:
    """Imports for type checkers count: two files that name each other's types are one file."""
    modules = {dotted(path) for path in MODULES}
    graph = {
        dotted(path): {
            name for name in imports(path) if name in modules - {"adaptkit", dotted(path)}
        }
        for path in MODULES
    }
    assert circle(graph) is None


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None


def test_names_files_and_folders_keep_their_size() -> None:
    folders: dict[Path, list[Path]] = {}
    for path in MODULES:
        folders.setdefault(path.parent, []).append(path)
        if relative(path).startswith(("ops/", "cli/")) and path.stem != "__init__":
            assert not path.name.startswith("_"), relative(path)
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {relative(p): n for p, n in sizes.items() if n > MOST_LINES} == {}
    crowded = {relative(f): len(held) for f, held in folders.items() if len(held) > MOST_FILES}
    assert crowded.keys() <= set(TABLES)


def test_lines_are_at_most_100_characters() -> None:
    wide = [
        f"{relative(path)}:{number}"
        for path in MODULES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDEST
    ]
    assert wide == []


def test_functions_are_short() -> None:
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    )
    assert lengths[len(lengths) * 9 // 10] <= P90


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_torch_click_and_rich_stay_where_they_belong(path: Path) -> None:
    here = relative(path)
    home = here.split("/")[0]
    roots = {name.partition(".")[0] for name in imports(path, top_only=True)}
    if home not in TORCH and here not in TORCH:
        assert "torch" not in roots, f"{here} imports torch at module level"
    anywhere = {name.partition(".")[0] for name in imports(path)}
    if home != "cli":
        assert not anywhere & {"click", "rich"}, here
    if "matplotlib" in anywhere:
        assert here.startswith(("cli/show/picture", "cli/show/plot_")), here
        assert "matplotlib" not in roots, (
            "matplotlib is an extra: it is imported when a picture is drawn"
        )


@pytest.mark.parametrize("path", MODULES, ids=relative)
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
        files = {p.stem for p in (PACKAGE / folder).glob("[!_]*.py")} - {"contract"}
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
