"""`slipway bench`: the table of what can be measured; knows no figures."""

import dataclasses
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes

from slipway.bench.adapters import AdaptersBench
from slipway.bench.compile import CompileBench
from slipway.bench.convert import ConvertBench
from slipway.bench.engine import EngineBench
from slipway.bench.layers import LayersBench
from slipway.bench.peers import PeersBench
from slipway.bench.roofline import RooflineBench
from slipway.bench.serving import ServingBench
from slipway.bench.sglang import SglangBench
from slipway.bench.swap import SwapBench
from slipway.bench.throughput import ThroughputBench
from slipway.bench.vllm import VllmBench


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure; figures come as JSON."""

    what: OmitArgPrefixes[
        OmitSubcommandPrefixes[
            Annotated[AdaptersBench, tyro.conf.subcommand("adapters")]
            | Annotated[ConvertBench, tyro.conf.subcommand("convert")]
            | Annotated[EngineBench, tyro.conf.subcommand("engine")]
            | Annotated[LayersBench, tyro.conf.subcommand("layers")]
            | Annotated[PeersBench, tyro.conf.subcommand("peers")]
            | Annotated[RooflineBench, tyro.conf.subcommand("roofline")]
            | Annotated[CompileBench, tyro.conf.subcommand("compile")]
            | Annotated[ServingBench, tyro.conf.subcommand("serving")]
            | Annotated[SglangBench, tyro.conf.subcommand("sglang")]
            | Annotated[SwapBench, tyro.conf.subcommand("swap")]
            | Annotated[ThroughputBench, tyro.conf.subcommand("throughput")]
            | Annotated[VllmBench, tyro.conf.subcommand("vllm")]
        ]
    ]

    def run(self) -> None:
        """Run the benchmark that was named."""
        self.what.run()
