"""The commands: parse, build a configuration, call one library function, print."""
