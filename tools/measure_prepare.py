"""How fast and how large preparing data is: `hysparse measure-prepare --megabytes 100 1000`.

For each size: makes a corpus of JSON lines in a temporary folder, prepares it with
`hysparse prepare-data`, and prints the rate in MB of text a second and the peak memory of all its
processes together; beside them the rate of the tokenizers library alone, texts in memory, on the
same cores. Rates by CPU seconds too: they hold on a machine that does other work as well. Needs
about 4 times the largest size on disk. With --copies N the corpus is N compressed files that are
one on disk, as a stream of N times the size would be: the disk holds the tokens alone, twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import psutil
from tokenizers import Tokenizer

from hysparse_megatron.command import command, make_parser, positive
from hysparse_megatron.data.tokenizer import check_vocab_size, train_tokenizer
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.packages import require_package

_SAMPLE_BYTES = 20_000_000
_BATCH_TEXTS = 2000
_POLL_SECONDS = 0.05


@command
def main(argv: Sequence[str]) -> int:
    """Measure as `argv` says, the command line without the program's name."""
    parser = make_parser("hysparse measure-prepare", __doc__)
    parser.add_argument("--megabytes", type=positive, nargs="+", default=[20, 100], metavar="MB")
    parser.add_argument("--vocab-size", type=positive, default=32000, metavar="N")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: one trained here")
    parser.add_argument("--copies", type=positive, metavar="N", help="of the corpus, as .jsonl.zst")
    parser.add_argument("--repeat", type=positive, default=1, metavar="N", help="times, in turns")
    parser.add_argument("--options", default="", help="more options of prepare_data, one string")
    args = parser.parse_args(list(argv))
    if args.tokenizer is not None and not args.tokenizer.is_file():
        raise ConfigError(f"--tokenizer {args.tokenizer}: is no file; without it one is trained")
    check_vocab_size(args.vocab_size)
    with tempfile.TemporaryDirectory(prefix="measure-prepare-") as name:
        folder = Path(name)
        for megabytes in args.megabytes:
            corpus = write_corpus(folder / "corpus.jsonl", megabytes * 1_000_000)
            tokenizer = args.tokenizer or folder / "tokenizer.json"
            if not tokenizer.exists():  # the first time
                sample = islice(_texts(corpus), 20_000)
                train_tokenizer(sample, args.vocab_size).save(str(tokenizer))
            given = corpus if args.copies is None else _copies(corpus, args.copies)
            for _ in range(args.repeat):
                _report(corpus, given, args.copies or 1, tokenizer, args.options.split())
    return 0


def write_corpus(path: Path, size_bytes: int, seed: int = 0) -> Path:
    """Write JSON lines of paragraphs drawn from Python's standard library."""
    generator = random.Random(seed)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    paragraphs = [
        paragraph
        for file in files
        for paragraph in file.read_text(encoding="utf-8", errors="ignore").split("\n\n")
        if len(paragraph) > 40
    ]
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size_bytes:
            count = min(40, int(generator.expovariate(1 / 4)) + 1)
            text = "\n\n".join(generator.choices(paragraphs, k=count))
            written += stream.write(json.dumps({"text": text, "id": written}) + "\n")
    return path


def _copies(corpus: Path, count: int) -> Path:
    """A folder of so many compressed files with the corpus, which are one file of the disk."""
    zstd = require_package("backports.zstd", "--copies")
    folder = corpus.parent / "copies"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    first = folder / "00000.jsonl.zst"
    with corpus.open("rb") as source, zstd.open(first, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    for number in range(1, count):
        (folder / f"{number:05d}.jsonl.zst").hardlink_to(first)
    return folder


def peak_tree_bytes(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; returns what it and all its children had resident at most, added up.

    The kernel keeps the peak of each, so that none is missed between two looks.
    """
    peaks: dict[int, int] = {}
    root = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):  # it ended in between
            for member in (root, *root.children(recursive=True)):
                status = Path(f"/proc/{member.pid}/status").read_text()
                if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                    peaks[member.pid] = int(found[1]) * 1024
        time.sleep(_POLL_SECONDS)
    return sum(peaks.values())


def _report(corpus: Path, given: Path, copies: int, tokenizer: Path, options: list[str]) -> None:
    text_bytes = sum(len(text.encode()) for text in _texts(corpus)) * copies
    output = corpus.parent / "output"
    command = [sys.executable, "-m", "hysparse_megatron.main", "prepare-data", *options]
    command += ["--quiet", "--tokenizer", str(tokenizer), "--output", str(output), str(given)]
    start, cpu_start = time.perf_counter(), _children_seconds()
    process = subprocess.Popen(command)
    peak = peak_tree_bytes(process)
    seconds, cpu = time.perf_counter() - start, _children_seconds() - cpu_start
    if process.returncode:
        raise SystemExit(process.returncode)
    shutil.rmtree(output)
    raw, raw_cpu = (copies * seconds for seconds in _library_seconds(corpus, tokenizer))
    print(
        f"{text_bytes / 1e6:.0f} MB of text: {text_bytes / seconds / 1e6:.2f} MB/s prepared, "
        f"{text_bytes / raw / 1e6:.2f} MB/s by the library alone, ratio {raw / seconds:.2f}; "
        f"{text_bytes / cpu / 1e6:.2f} and {text_bytes / raw_cpu / 1e6:.2f} MB per CPU second, "
        f"ratio {raw_cpu / cpu:.2f}; peak {peak / 1e6:.0f} MB",
        flush=True,
    )


def _children_seconds() -> float:
    """CPU time of all processes that ended."""
    times = os.times()
    return times.children_user + times.children_system


def _library_seconds(corpus: Path, tokenizer: Path) -> tuple[float, float]:
    """Wall and CPU time of the library's own batch encoding of all texts, on all cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    library = Tokenizer.from_file(str(tokenizer))
    texts = _texts(corpus)
    seconds = cpu = 0.0
    while batch := list(islice(texts, _BATCH_TEXTS)):
        start, cpu_start = time.perf_counter(), time.process_time()
        library.encode_batch_fast(batch, add_special_tokens=False)
        seconds += time.perf_counter() - start
        cpu += time.process_time() - cpu_start
    return seconds, cpu


def _texts(corpus: Path) -> Iterator[str]:
    with corpus.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)["text"]


if __name__ == "__main__":
    sys.exit(main())
