"""The ground that every room stands on: the home's layout, files, Delta tables and their indexes, locks, the clock."""
