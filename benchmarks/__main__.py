"""Runs all benchmarks."""

from benchmarks import (
    adapters,
    bases,
    batching,
    cluster,
    engine,
    measure,
    overhead,
    protocol,
    queue_throughput,
    routing,
    scaling,
    scaling_nodes,
    servers,
    stable_diffusion,
    webhooks,
    zoo,
)

measure.header()
for benchmark in (
    overhead,
    servers,
    queue_throughput,
    webhooks,
    protocol,
    routing,
    scaling,
    batching,
    engine,
    adapters,
    bases,
    stable_diffusion,
    zoo,
    cluster,
    scaling_nodes,
):
    benchmark.main()
