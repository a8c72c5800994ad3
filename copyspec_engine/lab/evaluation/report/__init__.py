"""Runs as tables, plots and one HTML page: `copyspec eval report`, and what each run leaves in its folder."""
