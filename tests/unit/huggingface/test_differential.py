"""Drawn folders: what is adopted computes what transformers computes, the rest is refused.

HYSPARSE_TEST_FOLDERS says how many are drawn (24): every other one has a flaw.
"""

import os
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hysparse_megatron.runtime.process_groups import destroy_process_groups
from hysparse_megatron.training.state import TrainingState
from tests.unit.huggingface.adopted import logits, start
from tests.unit.huggingface.drawn_folders import Folder, draw
from tests.unit.huggingface.exports import differences
from tests.unit.huggingface.folder_flaws import FLAWS
from tools.convert import main

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("group")]

COUNT = int(os.environ.get("HYSPARSE_TEST_FOLDERS", "24"))


def compare(folder: Folder, target: Path) -> tuple[float, float]:
    """Adopted and original: see `differences`."""
    assert adopt(folder, target) == 0, "refused"
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    length = 4 * min(64, model.config.max_position_embeddings)
    tokens = torch.randint(0, model.config.vocab_size, (2, length))
    states: list[TrainingState] = []
    try:
        found = logits(start(target, states), tokens)[..., : model.config.vocab_size]
    finally:
        destroy_process_groups()
    return differences(found, model, tokens)


def adopt(folder: Folder, target: Path) -> int:
    options = ["--window", "8", "--block-size", "4", "--num-selected", "2"]
    layout = f"{folder.layers}*F"
    return main(["adopt", str(folder.path), str(target), "--layout", layout, *options])


def test_drawn_folders(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flaws = list(FLAWS)
    random.Random(seed).shuffle(flaws)
    worst, wrong, refused = 0.0, [], set()
    for number in range(COUNT):
        torch.manual_seed(seed + number)
        try:
            folder = draw(tmp_path / f"{number}", random.Random(seed + number))
        except Exception as error:
            raise AssertionError(f"seed {seed + number}: cannot be drawn") from error
        target = tmp_path / f"{number}-start"
        capsys.readouterr()
        if number % 2 == 0:
            try:
                found, allowed = compare(folder, target)
            except Exception as error:
                found, allowed = float("inf"), 0.0
                print(type(error).__name__, error)
            worst = max(worst, found)
            if not found <= allowed:
                said = capsys.readouterr()
                wrong.append(f"{seed + number}: {found}, {folder.settings}\n{said.out}{said.err}")
        else:
            flaw = flaws[number // 2 % len(flaws)]
            put, code, expected = FLAWS[flaw]
            put(folder)
            ended, said = adopt(folder, target), capsys.readouterr().err
            if ended != code or expected not in said or target.exists():
                wrong.append(f"{seed + number}: {flaw}: {ended}, {folder.settings}\n{said}")
            refused.add(flaw)
    with capsys.disabled():
        print(
            f" {(COUNT + 1) // 2} adopted, at most {worst:.1e} of the largest logit apart; "
            f"{COUNT // 2} refused for {len(refused)} of {len(FLAWS)} reasons",
            end="",
        )
    assert not wrong, "\n\n".join(wrong)
