"""Imports of the kernels run one way, and to nothing of the package above them."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, inside functions too, those for types alone left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def modules(package: str) -> dict[str, set[str]]:
    """Every module of a package, by dotted name, and what it imports."""
    found = {}
    for path in sorted((KERNELS / package).rglob("*.py")):
        name = ".".join(path.relative_to(KERNELS).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = imported(path)
    return found


def test_no_circle_of_files() -> None:
    for package in ("hysparse_kernels", "benchmarks"):
        graph = modules(package)
        # The package itself loads its public names when they are asked for, after all others.
        del graph[package]
        order = TopologicalSorter({name: used & graph.keys() for name, used in graph.items()})
        order.prepare()  # raises CycleError, which names the circle


def test_kernels_import_nothing_of_the_package_above() -> None:
    for package in ("hysparse_kernels", "benchmarks"):
        for name, used in modules(package).items():
            above = {module for module in used if module.split(".")[0] == "hysparse_megatron"}
            assert not above, f"{name} imports {above}"


def test_limits_import_nothing() -> None:
    assert modules("hysparse_kernels")["hysparse_kernels.limits"] == set()
