from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tfm.training.checkpoints import CheckpointError, Checkpoints, Damaged
from tfm.training.named_arrays import named_leaves, snapshot

META = {'layout': 'unrolled'}


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  opt_state: Any
  key: Any


def make_state(step: int, width: int = 7) -> State:
  key = jax.random.fold_in(jax.random.key(3), step)
  params = {'encoder': {'layers_0': {'kernel': jax.random.normal(key, (width, 5)), 'bias': jnp.zeros(5)}},
            'target_embedding': {'table': jax.random.normal(key, (11, width)).astype(jnp.bfloat16)}}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  return State(jnp.asarray(step, jnp.int32), params, optimizer.init(params), key)


ABSTRACT = jax.eval_shape(lambda: make_state(0))


def assert_same(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (name, x), y in zip(named_leaves(a).items(), named_leaves(b).values()):
    assert x.dtype == y.dtype, name
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def saved(folder: Path, steps: list[int], **options: Any) -> Checkpoints:
  checkpoints = Checkpoints(folder, **options)
  for step in steps:
    checkpoints.save(step, make_state(step), META)
  checkpoints.close()
  return checkpoints


def test_restores_every_bit_type_and_node(tmp_path):
  saved(tmp_path, [1, 2])
  state, meta = Checkpoints(tmp_path).restore_latest(ABSTRACT)
  assert_same(state, make_state(2))
  assert isinstance(state, State) and isinstance(state.opt_state[1][0], optax.ScaleByAdamState)
  assert (meta['step'], meta['layout']) == (2, 'unrolled')


def test_places_arrays_as_the_shardings_say(tmp_path):
  saved(tmp_path, [1])
  mesh = jax.make_mesh((1,), ('data',))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), ABSTRACT)
  state, _ = Checkpoints(tmp_path).restore_latest(abstract)
  assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {sharding}
  assert_same(state, make_state(1))


def test_a_relative_or_absent_folder_works(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert Checkpoints('here').restore_latest(ABSTRACT) is None
  saved(Path('here'), [1])
  assert Checkpoints(tmp_path / 'here').steps() == [1]


def test_donated_and_overwritten_buffers_do_not_reach_the_checkpoint(tmp_path):
  overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
  checkpoints = Checkpoints(tmp_path)
  for step in range(1, 5):
    state = {'params': {'jax': jnp.arange(1_000_000.0) + step, 'numpy': np.arange(1000.0) + step}}
    checkpoints.save(step, state, META)
    donated = state['params'].pop('jax')
    overwrite(donated).block_until_ready()
    assert donated.is_deleted()
    state['params']['numpy'][:] = -1
  checkpoints.close()
  for step in range(1, 5):
    params, _ = checkpoints.restore_params(step)
    np.testing.assert_array_equal(params['jax'], np.arange(1_000_000, dtype=np.float32) + step)
    np.testing.assert_array_equal(params['numpy'], np.arange(1000.0) + step)


def test_the_snapshot_shares_no_memory():
  leaves = {'jax': jnp.arange(100_000.0), 'numpy': np.arange(5.0)}
  copies = snapshot(leaves)
  for name, leaf in leaves.items():
    assert not np.shares_memory(np.asarray(leaf), copies[name])


def test_a_step_is_never_overwritten(tmp_path):
  checkpoints = saved(tmp_path, [1])
  with pytest.raises(CheckpointError, match='Step 1 is saved already'):
    checkpoints.save(1, make_state(2), META)


def test_metadata(tmp_path):
  with pytest.raises(CheckpointError, match='layout'):
    Checkpoints(tmp_path).save(1, make_state(1), {})
  with pytest.raises(CheckpointError, match='metadata has step'):
    Checkpoints(tmp_path).save(1, make_state(1), {**META, 'step': 2})
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, make_state(1), {**META, 'note': [1, 'ä']}, {'nll': jnp.float32(0.5)})
  checkpoints.close()
  meta = checkpoints.read_meta(1)
  assert meta['note'] == [1, 'ä'] and meta['validation'] == {'nll': 0.5}


FIGURES = {2: 5.0, 4: 1.0, 6: 3.0, 8: 1.0, 10: 4.0, 12: float('nan')}


def run(folder: Path, last_step: int, killed_after: set[int] = frozenset(), **options: Any) -> list[int]:
  """Saves every step; at the steps of `killed_after` opens the folder anew, as a resumed process does."""
  options = {'keep_last': 2, 'keep_best': 2, **options}
  checkpoints = Checkpoints(folder, **options)
  for step in range(1, last_step + 1):
    checkpoints.save(step, make_state(step), META, {'nll': FIGURES[step], 'bleu': 1.0} if step in FIGURES else None)
    if step in killed_after:
      checkpoints._settle()  # Committed, but killed before anything is deleted.
      checkpoints._writer.close()
      checkpoints = Checkpoints(folder, **options)
      checkpoints.restore_latest(ABSTRACT)
  checkpoints.close()
  return checkpoints.steps()


def test_keeps_the_newest_and_the_best_whether_killed_or_not(tmp_path):
  kept = run(tmp_path / 'a', 13)
  assert kept == [4, 8, 12, 13]
  assert run(tmp_path / 'b', 13, killed_after={3, 8, 9, 13}) == kept
  assert run(tmp_path / 'c', 13, lower_is_better=False) == [2, 10, 12, 13]
  assert Checkpoints(tmp_path / 'a').best_step() == 4  # The earlier of two equals.
  assert Checkpoints(tmp_path / 'c', lower_is_better=False).best_steps() == [2, 10]
  params, meta = Checkpoints(tmp_path / 'a').restore_params('best')
  assert meta['step'] == 4
  assert_same(params, make_state(4).params)


def test_a_save_forced_by_a_signal_displaces_no_other(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep_last=2)
  for step in (1, 2):
    checkpoints.save(step, make_state(step), META)
  checkpoints.save(3, make_state(3), META, scheduled=False)
  checkpoints.wait()
  assert checkpoints.steps() == [1, 2, 3] and checkpoints.steps(scheduled_only=True) == [1, 2]
  checkpoints.save(4, make_state(4), META)
  checkpoints.close()
  assert checkpoints.steps() == [2, 4]


def test_a_kill_while_deleting_leaves_no_half_step(tmp_path, monkeypatch):
  saved(tmp_path, [1, 2, 3])
  def kill(path):
    raise KeyboardInterrupt
  monkeypatch.setattr(shutil, 'rmtree', kill)
  with pytest.raises(KeyboardInterrupt):
    Checkpoints(tmp_path, keep_last=2).restore_latest(ABSTRACT)
  monkeypatch.undo()
  assert Checkpoints(tmp_path).steps() == [2, 3]
  Checkpoints(tmp_path, keep_last=2).restore_latest(ABSTRACT)
  assert {path.name for path in tmp_path.iterdir()} == {'000002', '000003'}


def test_readers_delete_nothing(tmp_path):
  saved(tmp_path, [1, 2, 3])
  reader = Checkpoints(tmp_path)
  reader.restore_params()
  reader.wait()
  reader.close()
  assert reader.steps() == [1, 2, 3]


def test_best_needs_a_validation(tmp_path):
  with pytest.raises(CheckpointError, match="validated by 'nll'"):
    saved(tmp_path, [1]).restore_params('best')


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  folder = tmp_path_factory.mktemp('two')
  saved(folder, [1, 2])
  return folder


@pytest.fixture
def damaged(two_steps, tmp_path):
  """A copy to damage."""
  return Path(shutil.copytree(two_steps, tmp_path / 'copy'))


def files_of(step: Path) -> list[Path]:
  return sorted(path for path in step.rglob('*') if path.is_file())


def falls_back(folder: Path, what: str, caplog) -> None:
  checkpoints = Checkpoints(folder)
  with caplog.at_level(logging.WARNING, 'tfm'):
    state, meta = checkpoints.restore_latest(ABSTRACT)
  assert meta['step'] == 1
  assert_same(state, make_state(1))
  (warning,) = checkpoints.warnings
  assert 'step 2' in warning and 'step 1 is used instead' in warning and what in warning
  assert warning in caplog.text
  assert (folder / 'bad-000002').is_dir()
  checkpoints.save(2, make_state(2), META)  # The number is free again.
  checkpoints.close()
  state, _ = Checkpoints(folder).restore_latest(ABSTRACT)
  assert_same(state, make_state(2))


def flipped(data: bytes, rng: random.Random) -> bytes:
  position = rng.randrange(len(data))
  return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1:]


# TensorStore may still answer a request whose event loop the failed read has closed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_every_flip_cut_and_loss_is_harmless_or_found(damaged):
  original = make_state(2)
  found = set()
  rng = random.Random(0)
  intact_meta = Checkpoints(damaged).read_meta(2)
  for path in files_of(damaged / '000002'):
    data = path.read_bytes()
    for what in ('flip', 'flip', 'flip', 'flip', 'cut', 'loss') if data else ('loss',):
      if what == 'loss':
        path.unlink()
      else:
        path.write_bytes(flipped(data, rng) if what == 'flip' else data[:rng.randrange(len(data))])
      checkpoints = Checkpoints(damaged)
      try:
        params, meta = checkpoints.restore_params(2)
        arrays = checkpoints._read(2, meta, ('rest',))
      except Damaged as problem:
        assert 'step 2' in str(problem)
        found.add((what, path.relative_to(damaged / '000002').parts[0]))
        continue
      finally:
        path.write_bytes(data)
      assert_same(params, original.params)
      assert_same(arrays['opt_state/1/0/mu/target_embedding/table'],
                  original.opt_state[1][0].mu['target_embedding']['table'])
      assert meta == intact_meta
  assert found >= {(what, part) for what in ('flip', 'cut', 'loss') for part in ('params', 'rest', 'meta')}


def test_truncated(damaged, caplog):
  path = max(files_of(damaged / '000002' / 'params'), key=lambda path: path.stat().st_size)
  path.write_bytes(path.read_bytes()[:-10])
  falls_back(damaged, 'cannot be read', caplog)


@pytest.mark.parametrize('part', ['params', 'rest', 'meta'])
def test_missing_part(damaged, caplog, part):
  shutil.rmtree(damaged / '000002' / part)
  falls_back(damaged, 'meta data' if part == 'meta' else f'{part}/ is missing', caplog)


@pytest.mark.parametrize('part', ['params', 'rest'])
def test_parts_of_two_steps_mixed(damaged, caplog, part):
  shutil.rmtree(damaged / '000002' / part)
  shutil.copytree(damaged / '000001' / part, damaged / '000002' / part)
  falls_back(damaged, 'checksum', caplog)


def rewrite_meta(step: Path, **changes: Any) -> None:
  path = step / 'meta' / 'metadata'
  content = {**json.loads(path.read_text())['content'], **changes}
  crc = zlib.crc32(json.dumps(content, sort_keys=True).encode())
  path.write_text(json.dumps({'content': content, 'crc32': crc}))


def test_newer_format(damaged, caplog):
  rewrite_meta(damaged / '000002', format=99)
  falls_back(damaged, 'has format 99', caplog)


def test_renamed_step(damaged):
  os.rename(damaged / '000002', damaged / '000007')
  with pytest.raises(Damaged, match='step 7 .* holds step 2'):
    Checkpoints(damaged).restore_params(7)


def test_none_intact_is_an_error_every_time(damaged):
  for step in ('000001', '000002'):
    shutil.rmtree(damaged / step / 'rest')
  for _ in range(2):
    with pytest.raises(CheckpointError, match='None of the 2 checkpoints'):
      Checkpoints(damaged).restore_latest(ABSTRACT)
  assert Checkpoints(damaged).steps() == [1, 2]


def test_weights_alone_fall_back_too_but_move_nothing(damaged):
  shutil.rmtree(damaged / '000002' / 'params')
  checkpoints = Checkpoints(damaged)
  params, meta = checkpoints.restore_params()
  assert meta['step'] == 1 and len(checkpoints.warnings) == 1 and checkpoints.steps() == [1, 2]
  assert_same(params, make_state(1).params)
  with pytest.raises(Damaged, match='step 2'):
    checkpoints.restore_params(2)
  with pytest.raises(CheckpointError, match='no step 7; there are 1, 2'):
    checkpoints.restore_params(7)


def test_another_model_is_refused_and_nothing_moved(two_steps):
  other = jax.eval_shape(lambda: make_state(0, width=8))
  with pytest.raises(CheckpointError, match=r'kernel is float32\(7, 5\), not float32\(8, 5\)'):
    Checkpoints(two_steps).restore_latest(other)
  other_key = jax.eval_shape(lambda: make_state(0).replace(key=jax.random.key(0, impl='rbg')))
  with pytest.raises(CheckpointError, match='key is key<fry>'):
    Checkpoints(two_steps).restore_latest(other_key)
  assert Checkpoints(two_steps).steps() == [1, 2]


def test_weights_alone_cannot_be_resumed(tmp_path):
  for metadata, sentence in ((META, 'weights only'), ({**META, 'averaged': [1, 2]}, 'average of steps 1, 2')):
    folder = tmp_path / sentence
    checkpoints = Checkpoints(folder)
    checkpoints.save_params(2, make_state(2).params, metadata)
    checkpoints.close()
    assert_same(checkpoints.restore_params()[0], make_state(2).params)
    with pytest.raises(CheckpointError, match=f'{sentence}.*--init-from'):
      checkpoints.restore_latest(ABSTRACT)


def test_a_failed_save_is_reported(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, make_state(1), META)
  checkpoints.wait()
  def fail():
    raise OSError('No space left on device')
  checkpoints._writer.wait_until_finished = fail
  with pytest.raises(CheckpointError, match='No space left'):
    checkpoints.save(2, make_state(2), META)


SAVER = '''
import sys, jax, jax.numpy as jnp
from tfm.training.checkpoints import Checkpoints
folder = sys.argv[1]
def state(step):
  return {'params': {f'w{i}': jnp.full((64, 64), step + i, jnp.float32) for i in range(8)}, 'step': jnp.int32(step)}
checkpoints = Checkpoints(folder, keep_last=2, keep_best=1)
found = checkpoints.restore_latest(jax.eval_shape(lambda: state(0)))
step = 0 if found is None else int(found[0]['step'])
print('at', step, checkpoints.warnings, flush=True)
while True:
  step += 1
  checkpoints.save(step, state(step), {'layout': 'unrolled'}, {'nll': abs(step - 5)})
'''


def test_killed_at_any_moment_the_newest_step_is_intact(tmp_path):
  rng = random.Random(1)
  abstract = jax.eval_shape(lambda: {'params': {f'w{i}': jnp.zeros((64, 64)) for i in range(8)}, 'step': jnp.int32(0)})
  before = 0
  for _ in range(4):
    process = subprocess.Popen([sys.executable, '-c', SAVER, str(tmp_path)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    line = process.stdout.readline()
    assert line.startswith('at') and line.strip().endswith('[]'), line
    deadline = time.monotonic() + 60
    while max(Checkpoints(tmp_path).steps(), default=0) < before + 6 and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(rng.random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    reader = Checkpoints(tmp_path)
    newest = reader.steps()[-1]
    params, _ = reader.restore_params(newest)
    assert all((params[f'w{i}'] == newest + i).all() for i in range(8))
    assert newest > before
    before = newest
  writer = Checkpoints(tmp_path, keep_last=2, keep_best=1)
  state, _ = writer.restore_latest(abstract)
  assert int(state['step']) == newest and writer.warnings == []
  assert {path.name for path in tmp_path.iterdir()} == {f'{step:06d}' for step in (5, newest - 1, newest)}
