"""The outside: the HTTP service, event intake and batch scoring."""
