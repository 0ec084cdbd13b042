"""`python -m compactlm_jax` is the `compactlm` command."""

from compactlm_jax.cli import entry

if __name__ == '__main__':
  entry()
