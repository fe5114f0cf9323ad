"""Point-in-time dataset, fit, evaluate, register; batch scoring."""
