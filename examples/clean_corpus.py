"""Filters that people use before pretraining, of datatrove's own blocks: a recipe to change.

    pip install 'datatrove[io,processing]' spacy 'hysparse-megatron[data]'
    python examples/clean_corpus.py /data/raw /data/clean --tasks 32
    hysparse prepare-data --tokenizer tokenizer.json --output /data/tokens /data/clean/kept

Reads JSON lines (or WARC with `--warc`), and writes JSON lines: language and quality heuristics,
near-duplicates by minhash, and texts that share 12-grams with evaluation sets left out. Every step
is resumed where it was. For a cluster put `SlurmPipelineExecutor` for `LocalPipelineExecutor`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import (
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    URLFilter,
)
from datatrove.pipeline.readers import JsonlReader, WarcReader
from datatrove.pipeline.writers import JsonlWriter


def readers(args: argparse.Namespace) -> list[PipelineStep]:
    """Documents of the raw corpus."""
    if args.warc:
        return [WarcReader(args.raw), URLFilter(), Trafilatura()]
    return [JsonlReader(args.raw, text_key=args.text_key)]


def filters(args: argparse.Namespace) -> list[PipelineStep]:
    """What leaves documents out, cheap ones first; each writes what it removed, to be looked at."""

    def removed(name: str) -> JsonlWriter:
        return JsonlWriter(f"{args.clean}/removed/{name}")

    chosen: list[PipelineStep] = []
    if args.language:
        chosen.append(LanguageFilter(args.language, exclusion_writer=removed("language")))
    chosen.append(GopherRepetitionFilter(exclusion_writer=removed("repetition")))
    chosen.append(GopherQualityFilter(exclusion_writer=removed("quality")))
    if args.evaluations:  # an index made once by datatrove's NGramsDecontIndexer
        config = NGramsDecontConfig(n_grams=12)
        index = NGramsDecontFilter(
            args.evaluations, config=config, exclusion_writer=removed("contaminated")
        )
        chosen.append(index)
    return chosen


def stages(args: argparse.Namespace) -> list[LocalPipelineExecutor]:
    """Filters, then the four steps of minhash; each waits for the one before."""
    clean, config = Path(args.clean), MinhashConfig()
    folders = {name: str(clean / name) for name in ("filtered", "signatures", "buckets", "remove")}
    filtered, wanted = JsonlReader(folders["filtered"]), MinhashDedupFilter(folders["remove"])
    signatures = MinhashDedupSignature(folders["signatures"], config)
    steps: list[tuple[str, int, list[PipelineStep]]] = [
        ("filter", args.tasks, [*readers(args), *filters(args), JsonlWriter(folders["filtered"])]),
        (
            "signatures",
            args.tasks,
            [filtered, signatures],
        ),
        (
            "buckets",
            config.num_buckets,
            [MinhashDedupBuckets(folders["signatures"], folders["buckets"], config=config)],
        ),
        ("cluster", 1, [MinhashDedupCluster(folders["buckets"], folders["remove"], config=config)]),
        (
            "deduplicate",
            args.tasks,
            [filtered, wanted, JsonlWriter(str(clean / "kept"))],
        ),
    ]
    made: list[LocalPipelineExecutor] = []
    for name, tasks, pipeline in steps:
        made.append(
            LocalPipelineExecutor(
                pipeline=pipeline,
                tasks=tasks,
                workers=min(tasks, args.workers),
                logging_dir=str(clean / "logs" / name),
                depends=made[-1] if made else None,
            )
        )
    return made


def main() -> None:
    """Run all stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("raw", help="folder or URL of the raw corpus")
    parser.add_argument("clean", help="folder for the results")
    parser.add_argument("--warc", action="store_true", help="web archives in place of JSON lines")
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--language", default=None, help="such as en; needs fasttext's model")
    parser.add_argument("--evaluations", help="an index of datatrove's NGramsDecontIndexer")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=8)
    stages(parser.parse_args())[-1].run()


if __name__ == "__main__":
    main()
