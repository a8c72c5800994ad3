"""What answers are worth: metrics of texts, and the programs that a model wrote, run confined."""
