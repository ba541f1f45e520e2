"""An output that is there: whose inputs it is of, and what is never replaced with it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from prepared_corpora import contents, make_texts, prepare, request, write_lines

from hysparse_megatron.data.prepare import finished, run
from hysparse_megatron.errors import ConfigError, DataError
from tests.captured import Call
from tools.prepare_data import main

OTHER_TEXT = "prepared from other inputs"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", make_texts(40))


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but locks."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file): file.read_bytes() for file in files if file.suffix != ".lock"}


@pytest.mark.parametrize("place", ["out/raw/a.jsonl", "out.work/raw/a.jsonl", "out/tokenizer.json"])
@pytest.mark.parametrize("way", ["itself", "its folder", "a link to it", "an output that is one"])
def test_inputs_in_the_output_stay(tmp_path: Path, source: Path, place: str, way: str) -> None:
    prepare(tmp_path / "out", source)
    given, output = tmp_path / place, tmp_path / "out"
    given.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, given)
    if way == "its folder" and "raw" in place:
        given = given.parent
    elif way == "a link to it":
        (tmp_path / "link.jsonl").symlink_to(given)
        given = tmp_path / "link.jsonl"
    elif way == "an output that is one":
        output = tmp_path / "linked"
        output.symlink_to(tmp_path / "out")
    before = everything(tmp_path)
    for overwrite in (True, False):
        with pytest.raises(ConfigError, match=r"lies inside the output .*name another"):
            run.prepare(request(output, given, kind="jsonl"), overwrite=overwrite)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.md", ".notes", "sub/notes.md", "train.bin/notes.md"])
@pytest.mark.parametrize("option", ["overwrite", "repair"])
def test_other_files_are_never_replaced(
    tmp_path: Path, source: Path, name: str, option: str
) -> None:
    output = tmp_path / "out"
    prepare(output, source)
    (output / "train.bin").unlink()  # to be repaired
    path = output / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=f"holds {name.split('/')[0]}, which no preparation made"):
        run.prepare(request(output, source), **{option: True})
    assert everything(tmp_path) == before
    path.rename(tmp_path / "notes.md")
    if path.parent != output:
        path.parent.rmdir()
    run.prepare(request(output, source), **{option: True})
    assert "train.bin" in contents(output)


def test_a_file_that_comes_meanwhile_stays(tmp_path: Path, source: Path) -> None:
    """What was done is kept: the same command ends it once the file is gone."""
    output = tmp_path / "out"
    prepare(output, source)
    asked = request(output, source, seed=5)

    def come(*arguments: Any) -> None:
        (output / "notes.md").write_text("mine")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "sync_folder", come)
        with pytest.raises(ConfigError, match=r"notes\.md"):
            run.prepare(asked, overwrite=True)
    (output / "notes.md").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hysparse_megatron.data.prepare.tokenize._tokenize_unit", None)
        run.prepare(asked, overwrite=True)


def swap(path: Path, keep_times: bool) -> None:
    """Another text of the same size."""
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"0: ", b"9: "))
    if keep_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("hashed_bytes", [10**9, 0])
def test_other_text_of_the_same_size_is_refused(
    tmp_path: Path, source: Path, hashed_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large corpus where times differ, or all is to be read."""
    monkeypatch.setattr(finished, "_HASHED_BYTES", hashed_bytes)
    made = prepare(tmp_path / "out", source)
    source.touch()
    assert prepare(tmp_path / "out", source) == made
    before = contents(tmp_path / "out")
    swap(source, keep_times=False)
    with pytest.raises(ConfigError, match=rf"{OTHER_TEXT} .*a\.jsonl changed.*--overwrite"):
        prepare(tmp_path / "out", source)
    assert contents(tmp_path / "out") == before
    other = run.prepare(request(tmp_path / "out", source), overwrite=True)
    assert other is not None
    assert other.fingerprint != made.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out", "out.lock"]


def test_large_inputs_of_the_same_times_are_read_for_verify_alone(
    tmp_path: Path, source: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "_HASHED_BYTES", 0)
    command = ["--tokenizer", "bytes", "--output", str(tmp_path / "out"), str(source)]
    call(main, [*command, "--workers", "1"])
    swap(source, keep_times=True)
    assert "is prepared already" in call(main, command).err
    assert OTHER_TEXT in call(main, [*command, "--verify"], code=2).err


@pytest.mark.parametrize("dropped", ["source_identity", "sha256", "source_versions"])
def test_cards_of_before_are_known_again(
    tmp_path: Path, source: Path, dropped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hashes names and sizes count; without times of a large corpus the hashes do."""
    monkeypatch.setattr(finished, "_HASHED_BYTES", 0)
    made = prepare(tmp_path / "out", source)
    path = tmp_path / "out" / "dataset.json"
    card = json.loads(path.read_text())
    for entry in (card, *card["sources"]):
        entry.pop(dropped, None)
    path.write_text(json.dumps(card))
    assert prepare(tmp_path / "out", source) == made


@pytest.mark.parametrize("name", ["o5::x", "memory::x", "C::memory"])
def test_an_output_with_two_colons_in_its_name(
    tmp_path: Path, source: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = dataclasses.replace(request(name, source), tokenizer=None, vocab_size=300)
    for _ in range(2):
        made = run.prepare(asked)
        assert made is not None
        assert made.directory == str(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.jsonl", name, f"{name}.lock"])


def test_more_bad_documents_than_allowed_now_are_refused(tmp_path: Path, source: Path) -> None:
    """As the preparation itself would; a higher limit takes what is there."""
    with source.open("a") as stream:
        stream.write("no json\n")
    output = tmp_path / "out"
    with pytest.raises(DataError) as begun:
        prepare(output, source)
    made = prepare(output, source, max_bad=None)
    before = contents(output)
    with pytest.raises(DataError, match=r"1 bad document\(s\) so far, 0 allowed") as ended:
        prepare(output, source)
    assert str(ended.value) == str(begun.value)
    assert prepare(output, source, max_bad=1) == made
    assert contents(output) == before


def test_an_output_that_no_file_system_has_is_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match="unknown://x: cannot be reached: Protocol not known"):
        run.prepare(request("unknown://x", source))
    with pytest.raises(DataError, match="zip::memory://nowhere: cannot be reached"):
        run.prepare(request("zip::memory://nowhere", source))
