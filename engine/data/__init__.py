"""Rows -> conversations -> tokens and masks -> packed batches."""
