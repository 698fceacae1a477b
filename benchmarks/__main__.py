"""Runs all benchmarks."""

from benchmarks import engine, measure, overhead, queue_throughput

measure.header()
for benchmark in (overhead, queue_throughput, engine):
    benchmark.main()
