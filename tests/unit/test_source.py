"""The record of the code: its commit, and a diff that is kept, never written over, and bounded."""

from pathlib import Path
from typing import Any

import pytest

from hysparse_megatron import source
from hysparse_megatron.source import MAX_DIFF_BYTES, git_state, record_source
from tests.captured import captured


class Checkout:
    """A git checkout that holds the code, and a run that starts from it again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "code"
        self.run_path = folder / "run"
        self.code = self.folder / "package" / "source.py"
        self.starts: list[dict[str, Any]] = []
        self.code.parent.mkdir(parents=True)
        self.run_path.mkdir()
        self.code.write_text("first = 1\n")

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        command = ["git", "-C", str(self.folder), *identity, *arguments]
        return captured(command).stdout.strip()

    def commit(self) -> None:
        self.git("init")
        self.git("add", ".")
        self.git("commit", "-m", "first")

    def start(self) -> dict[str, Any]:
        self.starts.append({"git": record_source(self.run_path, self.starts)})
        return self.starts[-1]["git"]

    def saved(self) -> list[str]:
        return sorted(path.name for path in self.run_path.iterdir())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    made = Checkout(tmp_path)
    monkeypatch.setattr(source, "__file__", str(made.code))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return made


def test_git_state(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state() is None
    assert checkout.start() is None
    checkout.commit()
    head = checkout.git("rev-parse", "HEAD")
    assert git_state() == {"commit": head, "dirty": False}
    checkout.code.write_text("second = 2\n")
    assert git_state() == {"commit": head, "dirty": True}
    monkeypatch.setenv("PATH", str(checkout.run_path))  # no git installed
    assert git_state() is None


def test_a_clean_checkout_has_no_diff(checkout: Checkout) -> None:
    checkout.commit()
    assert "diff" not in checkout.start()
    assert checkout.saved() == []


def test_a_diff_gives_the_code_back(checkout: Checkout) -> None:
    checkout.commit()
    changed = "first = 1\r\nsecond = 'é'\n"
    checkout.code.write_text(changed, newline="")
    (checkout.folder / "new.py").write_text("secret = 5\n")
    assert checkout.start()["diff"] == "code.diff"
    text = (checkout.run_path / "code.diff").read_text()
    assert text.startswith("# not in git: new.py\n")
    assert "secret" not in text, "what git does not know may be anything"
    checkout.git("checkout", ".")
    checkout.git("apply", str(checkout.run_path / "code.diff"))
    assert checkout.code.read_bytes().decode() == changed


def test_starts_share_a_file_while_nothing_changes(checkout: Checkout) -> None:
    checkout.commit()
    assert "diff" not in checkout.start()
    checkout.code.write_text("second = 2\n")
    assert [checkout.start()["diff"] for _ in range(2)] == ["code.diff"] * 2
    checkout.code.write_text("third = 3\n")
    assert checkout.start()["diff"] == "code-4.diff"
    checkout.code.write_text("second = 2\n")
    assert checkout.start()["diff"] == "code.diff"
    assert checkout.saved() == ["code-4.diff", "code.diff"]
    assert "+second = 2" in (checkout.run_path / "code.diff").read_text()


def test_a_diff_is_kept_though_the_records_of_the_starts_are_lost(checkout: Checkout) -> None:
    checkout.commit()
    checkout.code.write_text("second = 2\n")
    checkout.start()
    checkout.code.write_text("third = 3\n")
    checkout.starts.clear()
    assert checkout.start()["diff"] == "code-1.diff"
    assert "+second = 2" in (checkout.run_path / "code.diff").read_text()


def test_a_long_diff_is_cut(checkout: Checkout) -> None:
    checkout.commit()
    checkout.code.write_text("x = 123456789\n" * (MAX_DIFF_BYTES // 10))
    for _ in range(2):
        assert checkout.start()["diff"] == "code.diff"
    content = (checkout.run_path / "code.diff").read_bytes()
    assert MAX_DIFF_BYTES < len(content) < MAX_DIFF_BYTES + 100
    assert content.endswith(b"# cut here: longer than 2,000,000 bytes\n")
