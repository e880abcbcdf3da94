"""Fiedler vectors of many small sparse graphs."""
