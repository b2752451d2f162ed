"""What a customer may ask for: export and erasure with its proof; and who may ask for whom."""
