"""Paths and URIs in the same words: what is read, what appears whole or not at all, and which errors mean what."""
