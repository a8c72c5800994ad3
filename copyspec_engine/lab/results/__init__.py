"""`copyspec bench report`: result files become the READMEs' tables and the plots of docs."""
