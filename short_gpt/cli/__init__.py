"""The command line. Only this package prints."""

from short_gpt.cli.commands import ALONE, COMMANDS

__all__ = ["ALONE", "COMMANDS"]

globals().update(COMMANDS)  # every command by its name
