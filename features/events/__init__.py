"""The canonical event: its vocabulary, its bounds, its parsing, and the identifiers that it carries."""
