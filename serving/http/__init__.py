"""HTTP: one small ASGI application, its keys, its bounds, its description."""
