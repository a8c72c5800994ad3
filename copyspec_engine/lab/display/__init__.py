"""What commands show: tables as Markdown, plots by matplotlib, and the conditions that stand beside them."""
