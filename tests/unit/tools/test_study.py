"""The study's corpus, plan and table, and a portion of one with a model that trains in seconds."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import pytest
import yaml
from backports import zstd

from hysparse_megatron.errors import ConfigError, DataError
from hysparse_megatron.runtime.faults import VARIABLE
from tests.captured import Call
from tools.prepare_data import main as prepare
from tools.study.__main__ import main
from tools.study.corpus import CARD, Recipe, is_held_out, page_text, write_corpus
from tools.study.plan import Run, read_study
from tools.study.results import Result, thinned, write_result
from tools.study.table import render

CLAIMS = Path(__file__).parents[3] / "tools" / "study" / "claims.yaml"
RECIPE = Path(__file__).parents[3] / "tools" / "study" / "recipe.yaml"


def small_recipe(max_train_chars: int = 10**9) -> Recipe:
    content = {
        "max_document_chars": 200,
        "max_file_chars": 1000,
        "validation_share": 0.3,
        "max_train_chars": max_train_chars,
        "sources": {
            "code": {
                "folder": "code",
                "suffixes": [".c"],
                "project_depth": 1,
                "domain": "code",
                "licence": "GPL",
                "exclude": ["*/generated"],
            }
        },
    }
    sources = content.pop("sources")
    return Recipe.parse({**content, "sources": sources})


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    for project in range(20):
        for name in ("b.c", "a.c", "long.c", "generated/g.c", "note.txt"):
            path = root / "code" / f"project{project}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x" * 2000 if name == "long.c" else f"{project} {name} " * 5)
    (root / "code" / "project3" / "copy.c").write_text((root / "code/project2/a.c").read_text())
    (root / "code" / "project4" / "latin.c").write_bytes(b"\xe9t\xe9")
    return root


def texts_of(path: Path) -> list[str]:
    plain = zstd.decompress(path.read_bytes())
    return [json.loads(line)["text"] for line in plain.decode().splitlines()]


def test_a_corpus_keeps_folders_whole_and_projects_on_one_side(
    sources: Path, tmp_path: Path
) -> None:
    card = write_corpus(small_recipe(), sources, tmp_path / "one", 10**9)
    train = texts_of(tmp_path / "one" / "train-000.jsonl.zst")
    held_out = texts_of(tmp_path / "one" / "validation-code.jsonl.zst")
    kept = {n for n in range(20) if is_held_out(f"code/project{n}", 0.3)}
    assert 0 < len(kept) < 20
    # One document a folder, files in the order of their names.
    assert sorted(held_out) == sorted(f"{n} a.c " * 5 + f"{n} b.c " * 5 for n in kept)
    assert len(train) == 20 - len(kept)
    assert card["files_left_out"] == {"came before": 1, "not UTF-8": 1, "too long": 20}
    written = json.loads((tmp_path / "one" / CARD).read_text())
    assert sum(entry["documents"] for entry in written["sources"]) == 20
    assert {entry["licence"] for entry in written["sources"]} == {"GPL"}


def test_the_same_folders_give_the_same_bytes_and_a_bound_a_sample(
    sources: Path, tmp_path: Path
) -> None:
    first = write_corpus(small_recipe(), sources, tmp_path / "one", 10**9)
    again = write_corpus(small_recipe(), sources, tmp_path / "two", 10**9)
    assert first == again
    sample = write_corpus(small_recipe(max_train_chars=400), sources, tmp_path / "three", 10**9)
    assert 0 < sample["train_characters"] <= 400 < first["train_characters"]
    whole = texts_of(tmp_path / "one" / "train-000.jsonl.zst")
    assert set(texts_of(tmp_path / "three" / "train-000.jsonl.zst")) < set(whole)


def test_parts_are_bounded_and_hold_everything(sources: Path, tmp_path: Path) -> None:
    card = write_corpus(small_recipe(), sources, tmp_path / "one", 1)
    parts = [name for name in card["parts"] if name.startswith("train")]
    # The compressor holds back what it has not ended, so that the last part may hold several.
    found = [text for part in parts for text in texts_of(tmp_path / "one" / part)]
    write_corpus(small_recipe(), sources, tmp_path / "two", 10**9)
    assert found == texts_of(tmp_path / "two" / "train-000.jsonl.zst")


def test_a_source_names_its_projects_and_its_share(sources: Path, tmp_path: Path) -> None:
    recipe = small_recipe()
    [first, *others] = recipe.sources
    folders = sorted(path.name for path in (sources / first.folder).iterdir() if path.is_dir())
    chosen = dataclasses.replace(first, projects=(folders[0],), validation_share=1.0)
    recipe = dataclasses.replace(recipe, sources=(chosen, *others))
    card = write_corpus(recipe, sources, tmp_path / "one", 10**9)
    own = [found for found in card["sources"] if found["source"] == first.name]
    assert [(found["split"], found["projects"]) for found in own] == [("validation", 1)]
    missing = dataclasses.replace(chosen, projects=(folders[0], "absent"))
    recipe = dataclasses.replace(recipe, sources=(missing, *others))
    with pytest.raises(DataError, match=f"source {first.name} lacks absent"):
        write_corpus(recipe, sources, tmp_path / "two", 10**9)


def test_a_page_is_read_as_its_words() -> None:
    page = "<html><head><title>T</title><script>x()</script></head><body><nav>menu</nav>"
    page += "<h1>One</h1><p>two &amp; <b>three</b></p>\n\n\n<ul><li>four</ul></body></html>"
    assert page_text(page).split() == ["One", "two", "&", "three", "four"]


@pytest.mark.thorough
def test_the_committed_studies_and_recipe_are_whole() -> None:
    assert len(read_study(CLAIMS.with_name("ablations.yaml")).variants) == 12
    study = read_study(CLAIMS)
    runs = study.runs
    assert len(runs) == len({run.name for run in runs}) == 18
    assert {run.seed for run in runs[:6]} == {1}
    # 300 million tokens of 16 x 8,192 a step.
    assert all(f"train.steps={math.ceil(3e8 / 131072)}" in run.overrides for run in runs)
    # Variants differ in their layers alone.
    of_layers = ("model.layout=", "model.full_gate=")
    rest = {tuple(o for o in run.overrides if not o.startswith(of_layers)) for run in runs[:6]}
    assert len(rest) == 1
    assert {source.domain for source in Recipe.read(RECIPE).sources} == {"code", "prose"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"baseline": "other"}, "baseline other is no variant"),
        ({"extra": 1}, "extra"),
        ({"variants": {"full": ["model.layoutt=F"]}}, "layoutt"),
        ({"tokens": "many"}, "tokens"),
        ({"seeds": 3}, "seeds"),
    ],
)
def test_a_study_that_cannot_be_is_refused(
    change: dict[str, object], told: str, tmp_path: Path, call: Call
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(CLAIMS.read_text()) | change))
    assert told in call(main, ["table", str(path), "--results", str(tmp_path)], code=2).err


def result_of(run: Run, loss: float) -> Result:
    evaluations = {"code": {"loss": [{"all": {"loss": loss}}]}}
    return Result(run.name, "print", "cpu", 3600.0, 1000.0, [], evaluations)


def test_the_table_pairs_seeds(tmp_path: Path) -> None:
    content = yaml.safe_load(CLAIMS.read_text())
    content["variants"] = {name: content["variants"][name] for name in ("full", "windows_1_3")}
    content["metrics"] = {"loss": "code.loss.0.all.loss"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    study = read_study(tmp_path / "study.yaml")
    assert "0 of 6 runs" in render(study, tmp_path)
    losses = {"full": [2.0, 3.0, 2.5], "windows_1_3": [2.1, 3.3, 2.6]}
    for run in study.runs:
        write_result(tmp_path, run, result_of(run, losses[run.variant][run.seed - 1]))
    text = render(study, tmp_path)
    assert "6 of 6 runs of 300,000,000 tokens, 6.0 hours" in text
    assert f"| full | 3 | 2.5000 ± {statistics.stdev(losses['full']):.4f} | 1,000 |" in text
    # Differences 0.1, 0.3, 0.1: mean 1/6, 4.303 x 0.11547 / sqrt(3) beside it.
    half = 4.303 * statistics.stdev([0.1, 0.3, 0.1]) / math.sqrt(3)
    assert f"| windows_1_3 | +0.1667 [{1 / 6 - half:+.4f}, {1 / 6 + half:+.4f}] |" in text

    stopped = dataclasses.replace(
        result_of(study.runs[1], 0.0), evaluations={}, stopped="5 bad steps in a row"
    )
    write_result(tmp_path, study.runs[1], stopped)
    text = render(study, tmp_path)
    assert f"{study.runs[1].name} diverged and was not evaluated: 5 bad steps in a row" in text
    assert "| windows_1_3 | 3, 1 diverged | 2.9500 ±" in text
    assert "| windows_1_3 | +0.2000 [" in text


def test_thinned_rows_keep_the_last_step_and_all_evaluations() -> None:
    rows = [{"step": n, "loss": 1.0, "mfu": 0.3} for n in range(1, 1002)]
    rows.insert(500, {"step": 500, "eval_loss": 2.0})
    kept = thinned(rows)
    assert len(kept) <= 402
    assert kept[-1] == {"step": 1001, "loss": 1.0}
    assert {"step": 500, "eval_loss": 2.0} in kept


@pytest.mark.thorough
def test_a_portion_runs_what_is_lacking_once(
    tmp_path: Path, call: Call, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"document {n}: " + "word " * 60}) for n in range(60)]
    text.write_text("\n".join(lines))
    data = ["--output", str(tmp_path / "data" / "train"), "--validation-fraction", "0.3"]
    assert prepare(["--tokenizer", "bytes", "--quiet", *data, str(text)]) == 0
    request.getfixturevalue("forks_for_commands")
    content = yaml.safe_load(CLAIMS.read_text()) | {
        "tokens": 500,
        "seeds": [5],
        "settings": [
            *("model=tiny_full", "train.seq_length=64", "train.global_batch_size=4"),
            *("train.micro_batch_size=4", "train.eval_interval=2", "train.eval_batches=1"),
            *("optim.decay_steps=1", "optim.warmup_steps=1", "checkpoint.interval=100"),
        ],
        "variants": {"full": ["model.layout=2*F"], "sparse": ["model.layout=F S"]},
        "evaluations": {
            "code": "evaluate --run-dir {run} --lengths 64 --sequences 4 --json {output}.json"
        },
        "metrics": {"loss": "code.loss.0.all.loss"},
    }
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(content))
    places = {name: str(tmp_path / name) for name in ("data", "results", "work")}
    command = ["run", str(study), *(x for n, p in places.items() for x in (f"--{n}", p))]
    assert "dense" in call(main, [*command, "--only", "full,dense"], code=2).err
    command += ["--only", "full"]
    assert "belongs into" in call(main, [*command, "--set", "optim.warmup_steps=2"], code=2).err
    often = ("--set", "checkpoint.interval=1")  # decides no result
    assert "1 of 2 runs" in call(main, [*command, *often]).out
    assert "checkpoint.interval=1 " in (tmp_path / "work" / "full-seed5.log").read_text()
    assert not (tmp_path / "work" / "full-seed5" / "checkpoints").exists()
    [kept] = (tmp_path / "results").iterdir()
    result = json.loads(kept.read_text())
    assert [row["step"] for row in result["rows"] if "loss" in row] == [1, 2]
    assert 0 < result["evaluations"]["code"]["loss"][0]["all"]["loss"] < 10

    before = kept.stat().st_mtime_ns
    assert main(command) == 0  # nothing is lacking
    assert kept.stat().st_mtime_ns == before

    # A run that diverges is finished as well.
    guarded = ["model.layout=2*F", "train.guard.max_bad_steps=1"]
    study.write_text(
        yaml.safe_dump(content | {"variants": content["variants"] | {"wild": guarded}})
    )
    monkeypatch.setenv(VARIABLE, "nan@0:2")
    assert "wild-seed5 diverged" in call(main, [*command[:-1], "wild", *often]).out
    assert (tmp_path / "work" / "wild-seed5" / "checkpoints" / "step-00000001").is_dir()
    result = json.loads((tmp_path / "results" / "wild-seed5.json").read_text())
    assert "1 bad steps in a row up to step 2" in result["stopped"]
    assert not result["evaluations"]

    content["variants"] = {"full": ["model.layout=3*F"]}
    study.write_text(yaml.safe_dump(content))
    # a result of other settings is not taken for this study's
    assert "other settings" in call(main, command, code=2).err


def test_a_recipe_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("sources: [a, b]\n")
    with pytest.raises(ConfigError, match="no recipe"):
        Recipe.read(path)
