"""The five benchmarks of the paper, run turn by turn with and without drafting, and what is said of their runs."""
