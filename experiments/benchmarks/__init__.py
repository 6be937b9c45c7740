"""What `experiments.benchmark` measures with, and the rarer benchmarks, commands of their own."""
