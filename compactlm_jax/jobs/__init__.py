"""What the commands do, as functions: loading models and runs, building jobs, training, exporting.

The one place where configuration, data, weights and tasks meet; a file for each kind of job.
"""

from compactlm_jax.jobs.commands import build_job, run_train
from compactlm_jax.jobs.export import run_export
from compactlm_jax.jobs.models import load_generator, load_model, params_digest, tokenizer_of

__all__ = ['build_job', 'load_generator', 'load_model', 'params_digest', 'run_export', 'run_train', 'tokenizer_of']
