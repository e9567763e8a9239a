"""What the command line and the benchmarks share: the machine, its measured limits, the checks and the demo."""
