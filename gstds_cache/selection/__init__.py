"""From embeddings to kept rows: plan, schedule, rules, the per-batch path."""
