"""Nothing imports from its right-hand neighbour, the core needs torch and numpy only, and every mutant has its place."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import mutants
import pytest

import perron

SOURCE = Path(__file__).parent.parent / "src" / "perron"
ORDER = [
    ("_errors",),
    ("activations", "constraints", "_files", "_numerics"),
    ("cells.refusal", "cells.sizes", "cells.map"),
    ("cells.affine_map",),
    ("cells.jacobian",),
    ("cells.step",),
    ("cells.reading",),
    ("cells",),
    ("cells.chain", "cells.opaque"),
    ("cells.trace",),
    ("theory",),
    ("problem", "solution"),
    ("solvers",),
    ("gradients",),
    ("nn",),
    ("models", "verify", "infinite_width"),
    ("data", "report"),
    ("training",),
    ("studies",),
    ("_arguments",),
    ("cli",),
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
EXTRAS = {"lightning", "torchmetrics", "jsonargparse", "sklearn", "matplotlib", "PIL", "rich"}
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, lazily and for types as well; those of this package without its name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("perron.")
                found.add(inner if inner in FILES else node.module.removeprefix("perron."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("perron.") for alias in node.names}
    return found


def rank(name: str) -> int:
    """Of a file by its own name, or of the folder that it lies in."""
    return RANK[name] if name in RANK else rank(name.rpartition(".")[0])


@pytest.mark.parametrize("name", [n for n in FILES if n not in ("", "__main__")])
def test_import_order(name: str) -> None:
    package = name in {n.rpartition(".")[0] for n in FILES}
    for module in imports(FILES[name]):
        # The list of a folder's names may import all of the folder.
        if module in FILES and not (package and module.startswith(f"{name}.")):
            assert module, f"{name} must not import perron as a whole"
            assert rank(module) <= rank(name), f"{name} must not import {module}"
        if rank(name) <= RANK["verify"]:
            assert module.partition(".")[0] not in EXTRAS, f"core module {name} imports the extra {module}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {name: imports(path) & FILES.keys() - {name} for name, path in FILES.items()}
    TopologicalSorter(graph).prepare()


def test_core_imports_no_extra() -> None:
    code = (
        f"import sys, perron.models, perron.verify; from perron import *; print(sorted(set(sys.modules) & {EXTRAS!r}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_importing_perron_imports_no_compiler() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import perron.models, perron.verify
from perron import *
added = set(sys.modules) - before
print(sorted(m for m in added if m.startswith(("torch._dynamo", "torch._inductor", "scipy", "sympy"))))
print("torch._dynamo" in sys.modules)
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["[]", "False"]


def test_public_names_are_imported_when_asked_for_and_type_checkers_see_the_same() -> None:
    code = "import sys, perron; dir(perron); print(perron.__version__, {'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == [perron.__version__, "set()"]
    (block,) = [n for n in ast.parse(FILES[""].read_text()).body if isinstance(n, ast.If)]
    seen = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert sorted(seen) == perron.__all__
    assert set(perron.__all__) <= set(dir(perron))
    for name, module in seen.items():
        place = f"perron.{name}" if module == "perron" else module
        found = importlib.import_module(place)
        assert getattr(perron, name) is (found if module == "perron" else getattr(found, name))
    with pytest.raises(AttributeError, match="no attribute 'equilibrium'"):
        _ = perron.equilibrium


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.bound)
def test_what_is_mutated_stands_there_once(mutant: mutants.Mutant) -> None:
    assert (SOURCE / mutant.path).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    for test in mutant.tests.split():
        path, *names = test.split("::")
        text = (SOURCE.parent.parent / path).read_text()
        assert all(f"{name.partition('[')[0]}(" in text for name in names)


@pytest.mark.parametrize("name", FILES)
def test_nobody_asks_of_what_class_a_step_is(name: str) -> None:
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            asked = ast.unparse(node.args[1])
            assert not re.search(r"\bStep\b|\w+Step\b", asked), f"{name} asks for {asked}"
