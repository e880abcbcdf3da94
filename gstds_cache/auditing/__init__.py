"""What a store's embeddings say of its data set: duplicates, leaks, labels in doubt, outliers."""
