"""Language models: where they come from, how they are loaded, what is read from their residual stream."""
