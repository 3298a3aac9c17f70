"""The `sae-bias` command: one module for each command."""
