"""Ground shared by every path: contracts, Feast's Redis layout, the sole online read and write.

Knows no HTTP framework and no command line; imports no sibling package.
"""
