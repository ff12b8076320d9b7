"""Benchmarks by name: each is a mapping from the rows of its data set on the hub to examples and passages."""
