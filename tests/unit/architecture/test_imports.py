"""Imports run one way: every part of the package stands on those below it."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import hysparse_megatron
from tests.captured import captured

PACKAGE = Path(hysparse_megatron.__file__).parent
NAME = PACKAGE.name

LAYERS = [
    ["errors"],
    ["files", "packages"],
    ["architecture"],
    ["config"],
    ["runtime"],
    ["command"],
    ["config.cli"],
    ["data"],
    ["model"],
    ["training.muon", "checkpoint.moments"],
    ["training.optimizer"],
    ["checkpoint"],
    ["huggingface.weights"],
    ["compatibility", "continuation"],
    ["status", "source", "reserve"],
    ["run_record"],
    ["rundir"],
    ["huggingface", "inference", "plan"],
    ["tracking"],
    ["evaluation"],
    ["training"],
    ["main"],
    ["completion"],
    ["__main__"],
]
"""Folders and files from the lowest up; what is named by itself is not of its folder's layer."""

LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}
CONFIG_STANDS_ON = {"architecture", "config", "errors", "files"}
PLAN_IS_READ_BY = {"plan", "tracking", "main", "__main__"}


def modules() -> dict[str, set[str]]:
    """What every file of the package imports of it, anywhere in the file."""
    paths = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        given = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                given |= {alias.name.removeprefix(f"{NAME}.") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = name.split(".")[: -node.level] if node.level else []
                source = ".".join([*above, *filter(None, [node.module])]).removeprefix(f"{NAME}.")
                for alias in node.names:
                    inside = f"{source}.{alias.name}"
                    given.add(inside if inside in paths else source)
        found[name] = given & paths.keys()
    return found


def part_of(module: str) -> str:
    """The longest entry of `LAYERS` that the module belongs to."""
    entries = [part for part in LEVELS if f"{module}.".startswith(f"{part}.")]
    assert entries, f"{module} belongs to no layer: name it in LAYERS"
    return max(entries, key=len)


MODULES = {name: imported for name, imported in modules().items() if name != "__init__"}


def test_every_import_goes_down() -> None:
    wrong = []
    for name, imported in MODULES.items():
        mine = part_of(name)
        for other in imported:
            theirs = part_of(other)
            if theirs != mine and LEVELS[theirs] >= LEVELS[mine]:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_no_circle_of_files() -> None:
    TopologicalSorter(MODULES).prepare()  # raises CycleError, which names the files


def test_configuration_and_planner_keep_to_themselves() -> None:
    for name, imported in MODULES.items():
        parts = {part_of(other).split(".")[0] for other in imported}
        if part_of(name) == "config":
            assert parts <= CONFIG_STANDS_ON, name
        if part_of(name) == "architecture":
            assert parts <= {"architecture", "errors"}, name
        if "plan" in parts:
            assert name.split(".")[0] in PLAN_IS_READ_BY, name


def test_the_architecture_needs_no_torch() -> None:
    code = f"import sys, pkgutil, {NAME}.architecture as package\n"
    code += "for one in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
    code += "    __import__(one.name)\n"
    code += "print([name for name in ('torch', 'megatron', 'omegaconf') if name in sys.modules])"
    done = captured([sys.executable, "-c", code], timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_no_test_module_imports_another() -> None:
    """What tests share stands in modules of helpers: a test module is collected, not imported."""
    tests = Path(__file__).parents[2]
    importers = [
        f"{path.relative_to(tests)}: {node.module}"
        for path in tests.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").rpartition(".")[2].startswith("test_")
    ]
    assert importers == []


def test_no_two_test_modules_have_one_name() -> None:
    """Folders of tests are no packages: pytest collects one of two modules of a name, and fails."""
    names = [path.name for path in Path(__file__).parents[2].rglob("test_*.py")]
    assert [name for name in set(names) if names.count(name) > 1] == []
