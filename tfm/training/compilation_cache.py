"""Compiled programs are kept on disk, so that resuming and translating start without compiling again."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def use_compilation_cache() -> None:
  """Set JAX's persistent cache, unless the user did (JAX_COMPILATION_CACHE_DIR)."""
  if jax.config.jax_compilation_cache_dir is None:
    home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')  # set but empty counts as unset
    jax.config.update('jax_compilation_cache_dir', str(home / 'tfm' / 'xla'))
    # All programs, not only those that took a second: a start has dozens of small ones.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
