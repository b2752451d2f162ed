"""One file a domain: its features, its item attributes, and what leaving means in it."""
