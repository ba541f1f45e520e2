"""Settings of folders that are not what they should be: refused in a sentence, never a traceback.

HYSPARSE_TEST_SETTINGS says how many are drawn of an exported folder's (24).
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.captured import Call
from tests.unit.huggingface.drawn_folders import Folder, draw
from tests.unit.huggingface.exports import random_run
from tests.unit.huggingface.folder_flaws import FLAWS
from tools.convert import main

COUNT = int(os.environ.get("HYSPARSE_TEST_SETTINGS", "24"))
ODD: list[Any] = [None, [], {}, ["x"], {"rope_type": ["x"]}, "x", "4", 0, -1, 1.5, True, 10**30]
OF_SETTINGS = [
    "list of architectures",
    "object for an architecture",
    "another configuration",
    "brackets",
    "no channels",
    "list of scalings",
    "no base",
    "text for a base",
    "text for a factor",
    "not finite",
    "another",
]


@pytest.fixture
def drawn(tmp_path: Path, seed: int) -> Folder:
    return draw(tmp_path / "drawn", random.Random(seed))


@pytest.mark.parametrize("flaw", OF_SETTINGS)
def test_of_an_original(flaw: str, drawn: Folder, call: Call) -> None:
    put, code, said = FLAWS[flaw]
    put(drawn)
    target = drawn.path.with_name("start")
    words = ["adopt", str(drawn.path), str(target), "--layout", f"{drawn.layers}*F"]
    sizes = ["--window", "8", "--block-size", "4", "--num-selected", "2"]
    assert said in call(main, [*words, *sizes], code).err
    assert not target.exists()


def test_a_nan_in_two_shards_is_the_same_in_both(drawn: Folder, call: Call) -> None:
    """The folder is not refused for shards that differ: a NaN is equal to no number."""
    drawn.files = 7
    test_of_an_original("not finite", drawn, call)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    run = random_run(tmp_path / "run", "model.layout=F")
    words = ["export", "--run-dir", str(run), "--tokenizer", str(run / "tokenizer.json")]
    assert main([*words, str(tmp_path / "out")]) == 0
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocab_size": None}, "vocab_size is null"),
        ({"vocab_size": "257"}, "got '257'; allowed a number"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings 'x'; allowed a whole"),
        ({"rope_parameters": "x"}, "rope_parameters x; allowed is an object"),
        ({"rope_parameters": True}, "rope_parameters True; allowed"),
        ({"rope_scaling": 1.5}, "rope_scaling 1.5; allowed"),
        ({"rope_parameters": {"rope_type": ["x"]}}, "of type ['x']; allowed default"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta of the rotary embedding is null"),
        ({"rope_parameters": {"rope_theta": "10000"}}, "got '10000'; allowed a number"),
    ],
)
def test_of_an_exported_model(
    settings: dict[str, Any], said: str, exported: Path, call: Call
) -> None:
    edit(exported, **settings)
    assert said in call(main, ["import", str(exported), str(exported.with_name("new"))], 2).err


def test_drawn_ones_of_an_exported_model(exported: Path, seed: int) -> None:
    """Whatever one of them is, importing ends with 0 or 2."""
    rng = random.Random(seed)
    original = json.loads((exported / "config.json").read_text())
    for number in range(COUNT):
        name, value = rng.choice([*original, "rope_scaling"]), rng.choice(ODD)
        edit(exported, **original | {name: value})
        code = main(["import", str(exported), str(exported.with_name(f"new-{number}"))])
        assert code in (0, 2), (name, value)


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
