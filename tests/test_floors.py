"""The shape of the package: what may import what, and where."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import tamba

ROOT = Path(tamba.__file__).parent

# A module imports only from floors below its own; rooms of several files are one place.
FLOORS = [
    ["errors"],
    ["sections", "progress", "ops", "artefact", "store"],
    ["plan", "model"],
    ["recipe", "families", "surgery"],
    ["formats"],
    ["checkpoint"],
    ["data", "plots", "decoding"],
    ["report", "teacher_text", "lookup_text", "trace", "chats"],
    ["card", "text", "generate", "calibrate"],
    ["analyze", "bench", "build", "train", "evaluate", "inspect", "generate_data"],
    ["run"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}
# Verbs are called by their public names there; others may ask the package for its version alone.
FACE = {"__init__", "_auto", "run", "__main__", "cli"}
# Counting bytes of a cache is arithmetic on a configuration; it lies with what reports it.
ALLOWED = {("inspect", "evaluate.memory"), ("report", "plots")}

# What an extra brings, and the room (or file, or rooms) that imports it.
OPTIONAL = {
    "causal_conv1d": "bench",
    "datasets": "data evaluate train",
    "fla": "bench",
    "gguf": "formats",
    "llvmlite": "ops",
    "lm_eval": "evaluate",
    "mamba_ssm": "bench",
    "mambapy": "bench",
    "matplotlib": "plots",
    "numba": "ops",
    "torchao": "train",
    "triton": "bench ops",
    "trl": "train",
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported module with the statement; blocks that only type checkers read left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if base == "tamba":
                # `from tamba import progress` names a module, not the package.
                yield from ((f"tamba.{alias.name}", node) for alias in node.names)
            else:
                yield base, node
        elif not isinstance(node, ast.expr):  # which has no statements in it
            yield from imports(node)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def faults_of_direction(name: str, tree: ast.AST) -> list[str]:
    room = name.partition(".")[0]
    found = []
    for target, _ in imports(tree):
        if target != "tamba" and not target.startswith("tamba."):
            continue
        inner = target.removeprefix("tamba").lstrip(".")
        if not inner or (inner.startswith("_") and inner != "__main__"):
            if room not in FACE:
                found += [f"{name} uses {face}" for face in faces_used(tree)]
            continue
        other = inner.partition(".")[0]
        if other == room or room in ("__init__", "_auto") or (room, inner) in ALLOWED:
            continue
        if other not in FLOOR:
            found.append(f"{name} imports {inner}, which has no floor")
        elif FLOOR[other] >= FLOOR.get(room, 0):
            found.append(f"{name} imports {inner}, which is not below it")
    return found


def faces_used(tree: ast.AST) -> list[str]:
    """Names of the package itself that are used as ``tamba.NAME``, but for its version."""
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "tamba"
        and node.attr != "__version__"
    ]


def test_every_room_has_a_floor() -> None:
    rooms = {name_of(path).partition(".")[0] for path in modules()}
    assert rooms - {"__init__", "_auto"} <= set(FLOOR), "put the new room on a floor"


def test_imports_run_downward() -> None:
    assert not [f for path in modules() for f in faults_of_direction(name_of(path), parsed(path))]


def test_directions_are_seen() -> None:
    """The check above can fail: upward, sideways, unknown, and the package itself."""
    wrong = (
        "from tamba.cli import main\nimport tamba.build\nimport tamba.new\nfrom tamba import run"
    )
    wrong += "\nimport tamba\ntamba.run(3)"
    assert len(faults_of_direction("train", ast.parse(wrong))) == 5
    assert not faults_of_direction("train", ast.parse("from tamba.model.config import X"))


def faults_of_packages(name: str, tree: ast.AST) -> list[str]:
    room = name.partition(".")[0]
    packages = {target.partition(".")[0] for target, _ in imports(tree)}
    return [
        f"{name} imports {p}" for p in sorted(packages) if room not in OPTIONAL.get(p, room).split()
    ]


def test_optional_packages_have_one_home() -> None:
    assert not [f for path in modules() for f in faults_of_packages(name_of(path), parsed(path))]
    assert faults_of_packages("model.block", ast.parse("def f():\n    import gguf.quants"))


def faults_of_printing(name: str, tree: ast.AST) -> list[str]:
    return [
        f"{name}, line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and name != "cli"
    ]


def test_only_the_command_line_prints() -> None:
    assert not [f for path in modules() for f in faults_of_printing(name_of(path), parsed(path))]
    assert faults_of_printing("build", ast.parse("def f():\n    print(3)"))


def test_every_module_says_what_it_is() -> None:
    assert not [name_of(path) for path in modules() if not ast.get_docstring(parsed(path))]


def faults_of_lateness(name: str, tree: ast.AST) -> list[str]:
    return [
        f"{name}, in {function.name}: {target}"
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for target, _ in imports(function)
        if target.startswith("tamba.")
        and name not in ("cli", "run", "__init__")
        # What needs an extra is imported when a file of that kind is opened, a call for it made.
        and not target.startswith(("tamba.formats.", "tamba.ops.kernels"))
    ]


def test_late_imports_are_where_they_are_meant() -> None:
    assert not [f for path in modules() for f in faults_of_lateness(name_of(path), parsed(path))]
    assert faults_of_lateness("build", ast.parse("def f():\n    from tamba.data import x"))


def test_the_readme_maps_every_room() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = readme[readme.index("## Map of the code") :]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    mapped = {room for row in rows for room in re.findall(r"`(\w+)`", row)}
    rooms = {name_of(path).partition(".")[0] for path in modules()}
    assert rooms - {"__init__", "_auto", "__main__"} <= mapped
    assert mapped | {"__main__"} == set(FLOOR)


def rooms_of_table(text: str) -> set[str]:
    """Files and folders that the table of rooms names, as ``train.py``, ``model/`` or
    ``model/config.py``."""
    table = text[text.index("## Rooms and their public names") :].partition("\n## ")[2]
    table = text[text.index("## Rooms and their public names") : text.index(table)]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {room for row in rows for room in re.findall(r"`([\w/.]+)`", row)}


def faults_of_rooms(text: str) -> list[str]:
    named = rooms_of_table(text)
    absent = [room for room in named if not (ROOT / room).exists()]
    tops = {room.partition("/")[0].removesuffix(".py") for room in named}
    rooms = {name_of(path).partition(".")[0] for path in modules()}
    return sorted(absent) + sorted(rooms - {"__init__", "_auto", "__main__"} - tops)


def test_the_table_of_rooms_is_the_tree() -> None:
    text = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    assert not faults_of_rooms(text)
    assert faults_of_rooms(text.replace("`train/`", "`trian/`")) == ["trian/", "train"]
