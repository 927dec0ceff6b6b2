"""Benchmarks for Slipway's developers; users' benchmarks are in slipway/bench/."""
