"""`copyspec bench report`: result files become tables and plots of docs."""
