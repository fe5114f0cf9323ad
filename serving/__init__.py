"""Redis to features to predictions over HTTP."""
