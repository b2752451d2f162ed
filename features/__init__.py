"""Know the customer: events to identity to features to Feast. Every table of data has its door in this package."""
