"""The command line. Only this package prints."""

from short_gpt.cli.commands import COMMANDS

__all__ = ["COMMANDS"]
