"""Training: text to packed windows (`text`, `data`), one optimiser step, the loop around it. Called by `jobs`."""
