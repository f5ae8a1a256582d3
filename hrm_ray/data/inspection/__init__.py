"""Inspects what the readers see in a data set, in a bounded time."""
