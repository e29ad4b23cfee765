import subprocess
import sys

import torch

from perron._numerics.compilers import constant, outside_compilers
from perron._numerics.rounding import flushes_subnormals
from perron.cells import reading, step


def test_the_mark_of_a_constant_is_what_torch_leaves() -> None:
    def one() -> int:
        return 1

    def other() -> int:
        return 1

    assert vars(constant(one)) == vars(torch.compiler.assume_constant_result(other)) != {}
    for function in (flushes_subnormals, step.full_float32, reading._methods, reading._is_patched):
        assert vars(one).items() <= vars(function).items()


def test_compilers_leave_what_is_called_outside_of_them() -> None:
    torch._dynamo.reset()
    seen = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return torch.sin(x)

    def outer(x: torch.Tensor) -> torch.Tensor:
        return torch.cos(outside_compilers()(inner, x + 1))

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    x = torch.randn(3)
    for _ in range(2):
        torch.testing.assert_close(torch.compile(outer, backend=backend)(x), torch.cos(torch.sin(x + 1)))
    assert seen == [False, False]
    assert len(graphs) == 2
    assert not any("sin" in str(target) for graph in graphs for target in graph)


def test_a_solve_imports_no_compiler() -> None:
    code = """
import sys, torch
from perron.nn import PositiveConcaveLinear
layer = PositiveConcaveLinear(3, 4)
layer(torch.randn(2, 3)).sum().backward()
print(layer.last_solution.certified, [m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor"))])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "True []"
