"""Units of work on a Ray cluster: the only place that imports ray (``pip install gstds-cache[ray]``)."""
