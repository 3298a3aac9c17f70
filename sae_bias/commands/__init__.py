"""The commands of `sae-bias`, a file each: parse, call, print.

Each module has `register(app)`, imports nothing heavier than typer at its head, and is named in `sae_bias.cli.COMMAND_MODULES`.
"""
