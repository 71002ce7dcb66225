"""Speed, measured: `python -m benchmarks.speed`. Nothing of the package imports this."""
