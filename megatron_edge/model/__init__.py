"""Models: where their weights come from, and how they become Megatron modules."""
