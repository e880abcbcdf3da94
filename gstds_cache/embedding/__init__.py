"""Images to committed shards: plan, skip what is committed, run."""
