"""Groups of commands of ``python -m features``."""
