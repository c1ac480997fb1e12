"""The command line. Only this package prints."""

from short_gpt.cli.commands import ALONE, COMMANDS, REMOVED

__all__ = ["ALONE", "COMMANDS", "REMOVED"]

globals().update(COMMANDS)  # every command by its name
