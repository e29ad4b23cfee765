"""Nothing imports from its right-hand neighbour, the core needs torch and numpy only, and every mutant has its place."""

import ast
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

SOURCE = Path(__file__).parent.parent / "src" / "perron"
ORDER = [
    ("activations", "constraints", "rounding", "_batch", "_files"),
    ("structured",),
    ("affine",),
    ("reading",),
    ("cells",),
    ("contraction", "monotone"),
    ("certificates",),
    ("enclosure",),
    ("solvers",),
    ("implicit",),
    ("nn",),
    ("models", "verify", "kernels"),
    ("data", "report"),
    ("training",),
    ("cli",),
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
EXTRAS = {"lightning", "torchmetrics", "jsonargparse", "sklearn", "matplotlib", "PIL", "rich"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "perron" else {node.module}
            )
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_import_order(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "perron" and len(parts) > 1 and parts[1] in RANK:
            assert RANK[parts[1]] <= RANK[own], f"{own} must not import {module}"
        if RANK[own] <= RANK["verify"]:
            assert parts[0] not in EXTRAS, f"core module {own} imports the extra {parts[0]}"


def test_core_imports_no_extra() -> None:
    code = f"import sys, perron, perron.models, perron.verify; print(sorted(set(sys.modules) & {EXTRAS!r}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.bound)
def test_what_is_mutated_stands_there_once(mutant: mutants.Mutant) -> None:
    assert (SOURCE / mutant.path).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    for test in mutant.tests.split():
        path, *names = test.split("::")
        text = (SOURCE.parent.parent / path).read_text()
        assert all(f"{name.partition('[')[0]}(" in text for name in names)
