"""The artifact: what its numbers mean (`formats`) and how it lies on disk (`store`)."""
