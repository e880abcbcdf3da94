"""Where samples come from: adapters, the ordered manifest, decoding."""
