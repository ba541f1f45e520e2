"""hysparse_kernels as a wheel of its own: built without a network, used without the checkout."""

import shutil
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import hysparse_kernels
import pytest

from tests.captured import captured

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:]  # no .pth file is read, so that nothing finds the checkout
import hysparse_kernels
import torch
query, key, value = torch.randn(3, 1, 32, 2, 8)
oracle = hysparse_kernels.oracle_attention(query, key, value, block_size=8, num_selected=2)
sparse = hysparse_kernels.block_sparse_attention(
    query, key, value, oracle.block_indices, block_size=8
)
assert sparse.shape == query.shape
assert not {name for name in sys.modules if name.startswith(("megatron", "hysparse_megatron"))}
print(hysparse_kernels.__version__, hysparse_kernels.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=ignored)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    build = [sys.executable, "-m", "pip", "wheel", *options, str(folder / "kernels")]
    captured(build)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_has_the_package_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = {name for name in names if ".dist-info/" not in name}
    package = ROOT / "kernels" / "hysparse_kernels"
    assert kept == {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.name.startswith(f"hysparse_kernels-{hysparse_kernels.__version__}-")


def test_it_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    paths = [str(tmp_path / "site"), sysconfig.get_path("purelib")]
    done = captured([sys.executable, "-I", "-S", "-c", PROGRAM, *paths], cwd=tmp_path)
    version, file = done.stdout.split()
    assert version == hysparse_kernels.__version__
    assert Path(file).is_relative_to(tmp_path / "site")


def test_both_packages_are_of_one_version_and_ask_for_one_torch() -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())
    theirs = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())
    assert ours["build-system"] == theirs["build-system"]
    assert ours["tool"]["setuptools"]["dynamic"] == theirs["tool"]["setuptools"]["dynamic"]
    assert set(theirs["project"]["dependencies"]) <= set(ours["project"]["dependencies"])
    packages = {name for name in ours["tool"]["setuptools"]["packages"] if "kernels" in name}
    found = (ROOT / "kernels" / "hysparse_kernels").rglob("__init__.py")
    folders = {str(path.parent.relative_to(ROOT / "kernels")).replace("/", ".") for path in found}
    assert packages == folders
