"""Losses on the teacher's states: what a cache of features allows beyond its entries. Pure torch functions."""
