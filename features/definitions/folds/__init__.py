"""Folds: what is kept of a customer as events come in, one file each. To add one is to write it and to name it in ``registered``."""
