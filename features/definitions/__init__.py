"""Every feature, once."""
