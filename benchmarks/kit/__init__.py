"""What the benchmarks are written with. Nothing here knows a benchmark."""
