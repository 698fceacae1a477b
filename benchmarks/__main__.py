"""Runs all benchmarks."""

from benchmarks import (
    adapters,
    bases,
    engine,
    measure,
    overhead,
    protocol,
    queue_throughput,
    stable_diffusion,
    webhooks,
    zoo,
)

measure.header()
for benchmark in (
    overhead,
    queue_throughput,
    webhooks,
    protocol,
    engine,
    adapters,
    bases,
    stable_diffusion,
    zoo,
):
    benchmark.main()
