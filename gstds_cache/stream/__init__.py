"""Selections as records: schema, writer, reader."""
