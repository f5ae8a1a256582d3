"""What the readers see in a data set, found out in a bounded time."""
