"""`copyspec bench`: drafters and engines side by side in one run, and the tables of their result files."""
