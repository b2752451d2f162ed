"""The commands of serving that are too long for its front door: batches and audiences."""
