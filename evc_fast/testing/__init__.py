"""The shapes and the error bounds that tests and benchmarks share."""
