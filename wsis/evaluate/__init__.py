"""Masks and maps -> numbers under a named protocol, and a report with pictures."""
