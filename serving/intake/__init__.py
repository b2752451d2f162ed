"""Live events in: durable before they are acknowledged, then on to log and online rows."""
