"""The `compactlm` command."""

from compactlm_jax.cli.commands import COMMANDS
from compactlm_jax.cli.main import command_help, entry, main, usage

__all__ = ['COMMANDS', 'command_help', 'entry', 'main', 'usage']
