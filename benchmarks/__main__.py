"""Runs all benchmarks."""

from benchmarks import adapters, engine, measure, overhead, queue_throughput

measure.header()
for benchmark in (overhead, queue_throughput, engine, adapters):
    benchmark.main()
