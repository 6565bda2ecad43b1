"""`python -m tests.fuzz.guided TARGET --runs N`: the same targets, guided by coverage.

Needs `pip install atheris` (Linux and macOS). Readers get bytes, beginning with whole files of
every kind. Verbs, names and patterns get choices: the bytes decide what is changed in a tiny file,
so that mutants stay files. A crash ends the run, and its input is written as `crash-…`.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RAW = ("header", "pickle", "index", "config", "metadata", "recipe")
SMALL = 4096  # bytes of an input


class Choices(random.Random):
    """Draws what bytes say, and zeros after their end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self.data, self.at = data, 0

    def getrandbits(self, count: int) -> int:
        size = (count + 7) // 8
        part = self.data[self.at : self.at + size]
        self.at += size
        return int.from_bytes(part, "little") & ((1 << count) - 1)

    def random(self) -> float:
        return self.getrandbits(16) / 65536


def seeds(name: str) -> Iterator[bytes]:
    """Whole inputs to begin with."""
    from tests.fuzz import readers
    from tests.fuzz.files import JSONS

    if name == "header":
        yield from (raw[: 8 + int.from_bytes(raw[:8], "little")] for raw in readers.ADAPTERS)
    elif name == "pickle":
        yield from readers.PICKLES
    elif name in ("index", "config", "recipe"):
        yield getattr(readers, name.upper()).encode()
    elif name == "metadata":
        yield from (text.encode() for text in JSONS)
    else:
        yield from (random.Random(n).randbytes(64) for n in range(50))


def target(name: str, folder: Path) -> Callable[[bytes], Any]:
    """What one execution calls with its input; raises for what must not happen."""
    from adaptkit.errors import AdaptkitError, InternalError
    from tests.fuzz.readers import TARGETS, Readers
    from tests.fuzz.whole import Bench

    runner: Any = Readers(folder) if name in TARGETS else Bench(folder)
    if name not in RAW:
        return lambda data: runner.once(name, Choices(data))

    def once(data: bytes) -> None:
        try:
            getattr(runner, f"{name}_of")(data)
        except AdaptkitError as error:
            if isinstance(error, InternalError):
                raise

    return once


def main() -> None:
    import atheris

    from tests.fuzz.run import NAMES

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description=__doc__)
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="a folder that keeps what reached new code")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home, corpus = Path(folder), given.corpus or Path(folder, "corpus")
        (home / "work").mkdir()
        corpus.mkdir(exist_ok=True, parents=True)
        for number, seed in enumerate(seeds(given.target)):
            (corpus / f"seed-{number}").write_bytes(seed)
        options = [f"-runs={given.runs}", f"-max_total_time={given.seconds}", f"-max_len={SMALL}",
                   "-timeout=20", "-rss_limit_mb=4096", "-print_final_stats=1"]  # fmt: skip
        atheris.Setup([sys.argv[0], *options, str(corpus)], target(given.target, home / "work"))
        atheris.Fuzz()


if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["adaptkit"]):
        import adaptkit.files.pickled.imports
        import adaptkit.ops.batch.recipe
        import adaptkit.ops.inspect.run  # noqa: F401
    main()
