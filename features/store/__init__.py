"""The only doors to stored events and features: log, timeline, snapshots, Feast, decisions."""
