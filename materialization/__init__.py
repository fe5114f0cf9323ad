"""Sources into Redis: plan, gate, load, resume, verify."""
