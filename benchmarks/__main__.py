"""Runs all benchmarks."""

from benchmarks import adapters, engine, measure, overhead, queue_throughput, webhooks

measure.header()
for benchmark in (overhead, queue_throughput, webhooks, engine, adapters):
    benchmark.main()
