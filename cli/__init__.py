"""The one front door, the banquet command; wires the packages together."""
