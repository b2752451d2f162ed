"""Jobs and judgement: labels, temporal splits, metrics, tracked runs and promotion."""
