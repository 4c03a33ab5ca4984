"""Any function of rows of similarities, block by block."""
