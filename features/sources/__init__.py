"""Where events and catalogues come from: a retailer's own files, Segment, GA4, the demo's data."""
