"""Benchmarks this package, a naive implementation and transformers' BLIP-2 with equal weights and inputs."""
