"""Minari: whole datasets into a buffer, and out of one."""
