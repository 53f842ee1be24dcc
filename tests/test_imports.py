"""Imports point one way, and what is heavy is imported where it is used.

tests -> everything      scripts -> curriculum, data      train_gpt.py -> a few of curriculum, data
curriculum -> data       data -> nothing of ours
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"data", "curriculum", "scripts", "train_gpt", "tests"}
FILES = [
    ROOT / "train_gpt.py",
    *(p for part in ("data", "curriculum", "scripts") for p in sorted((ROOT / part).glob("*.py"))),
]

MAY_IMPORT = {
    "data": {"data"},
    "curriculum": {"curriculum", "data"},
    "scripts": {"scripts", "curriculum", "data"},  # they launch train_gpt.py as a process
    "train_gpt.py": {"curriculum", "data"},
}
# The trainer reads an order; it knows nothing of scores, measures or schedules.
TRAINER_MAY_IMPORT = {
    f"curriculum.{name}" for name in ("ablate", "adaptive", "config", "fused", "loader", "runs", "world")
}
# The one exception: a checkpoint is run by the code that trained it, imported when a model is opened.
OPENS_CHECKPOINTS = "curriculum/reference.py"

TORCH_AT_THE_TOP = {"train_gpt.py", *(f"curriculum/{name}.py" for name in ("fused", "moments", "reference", "world"))}
HEAVY = {
    "datasets",
    "huggingface_hub",
    "plotly",
    "polars",
    "pyarrow",
    "ray",
    "scipy",
    "statsmodels",
    "tiktoken",
    "tokenizers",
    "torch",
    "transformers",
    "tyro",
    "wandb",
}


class Import(NamedTuple):
    module: str  # dotted, as far as it is known to be one: `from curriculum import order` is curriculum.order
    lazy: bool  # inside a function


def imports(path: Path) -> list[Import]:
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        match node:
            case ast.Import(names=names):
                found.extend(Import(alias.name, lazy) for alias in names)
            case ast.ImportFrom(module=module, level=level, names=names):
                assert level == 0, f"{path}: relative imports hide which way they point"
                packages = {"data", "curriculum", "scripts"}
                found.extend(Import(f"{module}.{a.name}" if module in packages else module, lazy) for a in names)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                lazy = True
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def top(module: str) -> str:
    return module.partition(".")[0]


def test_imports_are_found_wherever_they_stand(tmp_path):
    """The walk below proves nothing if it overlooks some."""
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b, c\nfrom curriculum import order\nfrom d.e import f\n"
        "class C:\n    import g\n    def m(self):\n        if 1:\n            import h\n"
        "try:\n    import i\nexcept ImportError:\n    pass\n"
    )
    assert {(i.module, i.lazy) for i in imports(path)} == {
        *(("a.b", False), ("c", False), ("curriculum.order", False), ("d.e", False)),
        *(("g", False), ("h", True), ("i", False)),
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    name = name_of(path)
    for module, lazy in imports(path):
        if top(module) not in OURS:
            continue
        if name == OPENS_CHECKPOINTS and module == "train_gpt":
            assert lazy, f"{name} imports train_gpt where it is imported itself: only inside functions"
        else:
            assert top(module) in MAY_IMPORT[name.partition("/")[0]], f"{name} -> {module}"


def test_the_trainer_knows_nothing_of_scores():
    found = {module for module, _ in imports(ROOT / "train_gpt.py") if top(module) == "curriculum"}
    assert found <= TRAINER_MAY_IMPORT


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_modules_are_imported_where_they_are_used(path):
    allowed = {"torch"} if name_of(path) in TORCH_AT_THE_TOP else set()
    assert {top(module) for module, lazy in imports(path) if not lazy} & HEAVY <= allowed


@pytest.mark.parametrize(
    "module",
    ["curriculum.order", "curriculum.schedules", "curriculum.score", "curriculum.config", "scripts.leaderboard"]
    + ["data.prepare", "data.sample", "data.tokenizer"],
)
def test_importing_a_module_loads_nothing_heavy(module):
    """In a fresh Python: also what others import on its behalf counts."""
    if not (ROOT / f"{module.replace('.', '/')}.py").exists():
        pytest.skip("not written yet")
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert module in done.stdout.split()
    assert {top(name) for name in done.stdout.split()} & HEAVY == set()
