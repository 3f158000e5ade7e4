"""Benchmarks: what flam claims to be fast at, measured beside others on the same data in the same run."""
