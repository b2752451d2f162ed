"""The console: pages for the people who use ubiquo, rendered by the service itself."""
