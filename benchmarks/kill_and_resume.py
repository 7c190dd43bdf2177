"""Is a run that is killed and resumed the same run, to the byte?

    python benchmarks/kill_and_resume.py [--kills 20] [--seed 0] [--folder DIR]

One run trains undisturbed. Another gets SIGKILL at random moments, every second time while a checkpoint is being
written, and is resumed by the same command each time. At the end weights, optimizer state, metrics.jsonl and the set
of kept checkpoints must be the same bytes. Exits 1 if they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 1500
SETTINGS = f"""
  --model.encoder-layers 1 --model.decoder-layers 1 --model.d-model 32 --model.d-ff 64 --model.num-heads 2
  --model.dropout 0.1 --model.attention-dropout 0.1 --tokenizer.vocab-size 300
  --data.tokens-per-batch 256 --data.limit 20000 --data.held-out 20 --training.steps {STEPS} --training.log-every 7
  --training.validate-every 300 --training.checkpoint-every 20 --training.keep-last 3 --training.keep-best 2
  --training.validation-sentences 4 --training.samples 2 --training.patience 100
""".split()


def begin(folder: Path) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), '--run', str(folder), *SETTINGS], cwd=ROOT,
                          stdout=subprocess.DEVNULL, stderr=open(f'{folder}.log', 'a'))


def progress_of(folder: Path) -> tuple[int, bool]:
  """(bytes of metrics written, whether a checkpoint is being written right now)."""
  metrics, checkpoints = folder / 'metrics.jsonl', folder / 'checkpoints'
  saving = checkpoints.is_dir() and any(checkpoints.glob('*.orbax-checkpoint-tmp*'))
  return (metrics.stat().st_size if metrics.exists() else 0), saving


def kill_at_random(folder: Path, rng: random.Random, while_saving: bool) -> str | None:
  """Start or resume, wait for a moment, kill; None if the run ended before that."""
  process = begin(folder)
  before, _ = progress_of(folder)
  deadline = time.monotonic() + rng.uniform(0.0, 2.0)
  training = False
  while process.poll() is None:
    size, saving = progress_of(folder)
    if not training and size != before:  # resumed and training: now the clock runs
      training, deadline = True, time.monotonic() + rng.uniform(0.0, 1.5)
    if training and time.monotonic() > deadline and (saving or not while_saving):
      time.sleep(rng.uniform(0.0, 0.02))
      os.kill(process.pid, signal.SIGKILL)
      process.wait()
      return 'while saving' if saving else 'between saves'
    time.sleep(0.0005)
  if process.returncode != 0:
    sys.exit(f'The run failed by itself; see {folder}.log')
  return None


def finish(folder: Path) -> None:
  if begin(folder).wait() != 0:
    sys.exit(f'The run failed; see {folder}.log')


def fingerprint(folder: Path) -> dict[str, str]:
  """What must be equal: a digest of every array of the last checkpoint, the kept steps, the metrics."""
  sys.path.insert(0, str(ROOT))
  from tfm.training.checkpoints import Checkpoints
  from tfm.training.run_folder import RunFolder
  run = RunFolder(folder)
  checkpoints = Checkpoints(run.checkpoints)
  last = checkpoints.steps()[-1]
  meta = checkpoints.read_meta(last)
  arrays = checkpoints.restore_arrays(last)
  digest = hashlib.sha256()
  for name in sorted(arrays):
    digest.update(name.encode() + str(arrays[name].dtype).encode() + arrays[name].tobytes())
  return {'step': str(last), 'arrays': f'{len(arrays)} arrays, sha256 {digest.hexdigest()[:16]}',
          'checksums': hashlib.sha256(json.dumps(meta['arrays'], sort_keys=True).encode()).hexdigest()[:16],
          'kept steps': str(checkpoints.steps()),
          'metrics.jsonl': f'{run.metrics.stat().st_size} bytes, sha256 '
                           f'{hashlib.sha256(run.metrics.read_bytes()).hexdigest()[:16]}'}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--folder', type=Path, default=None)
  arguments = parser.parse_args()
  base = arguments.folder or Path(tempfile.mkdtemp(prefix='kill-and-resume-'))
  base.mkdir(parents=True, exist_ok=True)
  undisturbed, killed = base / 'undisturbed', base / 'killed'
  finish(undisturbed)
  rng = random.Random(arguments.seed)
  kills: list[str] = []
  while len(kills) < arguments.kills:
    moment = kill_at_random(killed, rng, while_saving=len(kills) % 2 == 1)
    if moment is None:
      sys.exit(f'The run ended after {len(kills)} kills; raise STEPS.')
    kills.append(moment)
    print(f'kill {len(kills)}: {moment}', flush=True)
  finish(killed)
  one, other = fingerprint(undisturbed), fingerprint(killed)
  for name in one:
    print(f'{"same     " if one[name] == other[name] else "DIFFERENT"} {name}: {one[name]}'
          + ('' if one[name] == other[name] else f' | {other[name]}'))
  print(f'{len(kills)} kills, {kills.count("while saving")} of them while saving')
  sys.exit(0 if one == other else 1)


if __name__ == '__main__':
  main()
