"""Other people's ways to spend fewer gradients, each with its formula and its source, in the same trainer."""
