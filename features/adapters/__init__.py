"""One file a source: rows of a foreign system in, canonical events out."""
