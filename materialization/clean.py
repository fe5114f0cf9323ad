"""Removal of what no definition claims any more from the online store: `banquet clean`.

Hash fields of views and features that are gone, rows past their ttl, keys left empty, ledgers of removed
views. Never a key of another project. Knows Redis and, through ``core.layout``, Feast's bytes; knows no
source and no Feast object.
"""

from __future__ import annotations
