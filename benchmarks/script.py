"""Command line of a benchmark: the fields of its dataclass are its options.

Not here: the benchmarks, one module each (README.md lists them).
"""

import logging
import sys
from typing import Any

import tyro

from slipway.cli import PROGRESS_LOGGERS
from slipway.errors import SlipwayError


def run(name: str, benchmark: type[Any]) -> None:
    """Read the options of `python -m benchmarks.NAME` and run the benchmark.

    ``benchmark``: a dataclass with a method ``run``. An error of Slipway's is printed on stderr
    without a traceback; the exit code is 2 then, and 130 after an interruption.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in PROGRESS_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        tyro.cli(benchmark, prog=f"python -m benchmarks.{name}").run()
    except SlipwayError as error:
        print(f"benchmarks.{name}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
