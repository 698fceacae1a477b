"""Runs all benchmarks."""

from benchmarks import adapters, bases, engine, measure, overhead, queue_throughput, stable_diffusion

measure.header()
for benchmark in (overhead, queue_throughput, engine, adapters, bases, stable_diffusion):
    benchmark.main()
