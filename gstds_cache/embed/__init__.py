"""Images to committed units: plan, skip what is committed, run."""
