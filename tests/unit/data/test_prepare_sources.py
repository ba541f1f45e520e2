"""Which files of the inputs are read, and in what order."""

import os
from pathlib import Path

import pytest
from prepared_corpora import all_texts, make_texts, prepare, write_arrow, write_lines

from hysparse_megatron import packages
from hysparse_megatron.data.prepare.sources import list_sources
from hysparse_megatron.errors import ConfigError, DataError

TEXTS = make_texts(200)


def test_listing(tmp_path: Path) -> None:
    saved = write_arrow(tmp_path / "saved", TEXTS)
    assert [source.name for source in list_sources([str(tmp_path)])] == [
        f"{tmp_path.name}/saved/data-b.arrow",
        f"{tmp_path.name}/saved/data-a.arrow",
    ]
    with pytest.raises(ConfigError, match=r"data-b\.arrow: is given twice"):
        list_sources([str(saved), str(saved / "data-b.arrow")])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds the splits train, test; give those .*/train"):
        list_sources([str(tmp_path)])
    (saved / "data-a.arrow").unlink()
    with pytest.raises(DataError, match=r"data-a\.arrow: missing"):
        list_sources([str(saved)])
    with pytest.raises(DataError, match="No such file"):
        list_sources([str(tmp_path / "nowhere")])


def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(packages.importlib, "import_module", refuse)
    for name, package in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "backports.zstd")):
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=rf"pip install {package} \(the extra `data`"):
            list_sources([str(tmp_path / name)])


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "pipe.txt")
    for given in ("pipe.jsonl", "folder"):
        with pytest.raises(DataError, match=r"pipe\.\w+: is a pipe, a socket or a device"):
            list_sources([str(tmp_path / given)])
    (tmp_path / "folder" / "pipe.txt").unlink()
    (tmp_path / "folder" / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="dangling: cannot be read: No such file"):
        list_sources([str(tmp_path / "folder")])


def test_other_text_in_a_saved_dataset_is_read(tmp_path: Path) -> None:
    """Only what `datasets` itself writes beside the rows is left out."""
    saved = write_arrow(tmp_path / "saved", TEXTS)
    (saved / "cache-0123456789abcdef.arrow").write_bytes(b"rows of a map")
    (saved / "sub").mkdir()
    write_lines(saved / "extra.jsonl", ["beside the rows"])
    write_lines(saved / "sub" / "more.jsonl", ["below them"])
    (saved / "notes.txt").write_text("a text")
    expected = sorted([*TEXTS, "beside the rows", "below them", "a text"])
    assert all_texts(prepare(tmp_path / "out", saved)) == expected
    names = [source.name for source in list_sources([str(saved)])]
    assert names[-2:] == ["saved/data-b.arrow", "saved/data-a.arrow"]


def test_rows_that_a_saved_dataset_does_not_list_are_refused(tmp_path: Path) -> None:
    """As from an earlier save in more files."""
    saved = write_arrow(tmp_path / "saved", TEXTS)
    (saved / "data-c.arrow").write_bytes((saved / "data-a.arrow").read_bytes())
    with pytest.raises(DataError, match=r"data-c\.arrow: .*state\.json does not list it; remove"):
        list_sources([str(tmp_path)])


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    """By the library itself, which keeps what a `map` gave beside the rows."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    loaded = datasets.load_from_disk(str(tmp_path / "saved"))
    loaded.map(lambda row: {"text": row["text"].upper()})
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    write_lines(tmp_path / "saved" / "extra.jsonl", ["beside the rows"])
    made = prepare(tmp_path / "out", tmp_path / "saved")
    assert all_texts(made) == sorted([*TEXTS, "beside the rows"])
