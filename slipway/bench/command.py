"""Subcommands of `slipway bench`.

Not here: the benchmarks themselves (serving.py, throughput.py, engine.py); those that Slipway's
developers run beside other engines (benchmarks/ at the top of the repository).
"""

import dataclasses
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes

from slipway.bench.engine import EngineBench
from slipway.bench.serving import ServingBench
from slipway.bench.throughput import ThroughputBench


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure a server, an offline load or the engine; figures are printed as JSON."""

    what: OmitArgPrefixes[
        OmitSubcommandPrefixes[
            Annotated[EngineBench, tyro.conf.subcommand("engine")]
            | Annotated[ServingBench, tyro.conf.subcommand("serving")]
            | Annotated[ThroughputBench, tyro.conf.subcommand("throughput")]
        ]
    ]

    def run(self) -> None:
        """Run the benchmark that the command line names."""
        self.what.run()
