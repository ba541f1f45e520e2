"""What is compiled where there is no Transformer Engine keeps its bounds when it is compiled.

Elsewhere in the tests the compiler is off: see conftest.py.
"""

import os
import re
import subprocess
import sys

from tests.docs.blocks import ROOT

FILES = [f"tests/unit/model/test_{name}.py" for name in ("loss", "norm", "projection", "rotary")]


def test_compiled_functions_keep_the_bounds_of_plain_ones() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES],
        cwd=ROOT,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "0"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None
    assert int(passed[1]) > 30
