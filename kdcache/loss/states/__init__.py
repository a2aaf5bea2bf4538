"""Losses on the inner states of a teacher: hidden states, relations, attention, RKD, CRD, and exact KD from the last state.

They are torch functions for a loop of one's own; `reference` and `dense_reference` say what each of them means.
"""
