"""The container recipes: one installation, versions as constrained, shell that parses."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.captured import captured

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "container"
SCRIPT = FOLDER / "install.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """Names and arguments of the Dockerfile's lines."""
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    told = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in told]


def sections() -> dict[str, str]:
    """The header and the sections of the Apptainer definition."""
    header, *rest = re.split(r"^%(\w+)\n", (FOLDER / "hysparse.def").read_text(), flags=re.M)
    return {"": header, **dict(zip(rest[::2], rest[1::2], strict=True))}


def check_shell(text: str) -> None:
    captured(["bash", "-n"], input=text)


def test_the_dockerfile_is_of_known_instructions_and_its_shell_parses() -> None:
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM"
    assert set(names) <= {"FROM", "COPY", "RUN", "ENV", "CMD"}
    runs = [rest for name, rest in instructions() if name == "RUN"]
    assert runs
    for run in runs:
        check_shell(run)
        assert (ROOT / run.removeprefix("/opt/source/")).is_file()


def test_the_definition_is_of_known_sections_and_its_shell_parses() -> None:
    found = sections()
    assert set(found) == {"", "files", "post", "environment", "runscript"}
    for name in ("post", "environment", "runscript"):
        check_shell(found[name])
    copied = dict(re.findall(r"^    (\S+) (\S+)$", found["files"], flags=re.M))
    assert copied == {name: f"/opt/source/{name}" for name in copied}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    # All that installing needs, and not the environment that may lie beside it.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = project["tool"]["setuptools"]["package-dir"].values()
    needed = {Path(folder).parts[0] for folder in folders} | {"pyproject.toml", "constraints.txt"}
    needed |= {PROJECT["readme"], *PROJECT["license-files"], "container"}
    assert set(copied) == needed


def test_both_install_the_same_into_the_same_image() -> None:
    told = dict(instructions())
    header = dict(re.findall(r"^(\w+): (.*)$", sections()[""], flags=re.M))
    assert header == {"Bootstrap": "docker", "From": told["FROM"]}
    assert sections()["post"].strip() == told["RUN"]
    assert f"export {told['ENV']}" in sections()["environment"]
    assert f"{told['COPY'].split()[1]}/{SCRIPT.relative_to(ROOT)}" == told["RUN"]


def test_versions_are_those_of_the_project() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    cuda = dict(re.findall(r"^([\w-]+)==(\S+)$", constraints, flags=re.M))["cuda-toolkit"]
    assert f":{cuda}-cudnn-devel-" in dict(instructions())["FROM"]
    script = SCRIPT.read_text()
    python = re.search(r">=(3\.\d+)", PROJECT["requires-python"])
    assert python is not None
    assert set(re.findall(r"python(3\.\d+)", script)) == {python[1]}
    assert "--constraint constraints.txt" in script
    named = {name for names in re.findall(r'"\.\[(.*?)\]"', script) for name in names.split(",")}
    assert "te" in named
    assert named <= set(PROJECT["optional-dependencies"])
    [engine] = PROJECT["optional-dependencies"]["te"]
    assert f"core_cu{cuda.partition('.')[0]}" in engine


def test_the_script_parses_and_is_clean() -> None:
    assert SCRIPT.stat().st_mode & 0o100
    check_shell(SCRIPT.read_text())
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([program, str(SCRIPT)], check=True)


def test_the_preset_finds_the_python_of_the_image() -> None:
    preset = yaml.safe_load((ROOT / "conf/cluster/slurm_container.yaml").read_text())["slurm"]
    assert preset["python"] == "python"
    assert dict(instructions())["ENV"].startswith("PATH=/opt/hysparse/bin:")
    assert "venv /opt/hysparse" in SCRIPT.read_text()
    assert any("hysparse.sqsh" in option for option in preset["srun_options"])
