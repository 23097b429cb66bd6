"""Stands in for EmbodiChain, whose simulator needs a GPU."""
