from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from tfm.config import DecodingConfig
from tfm.interop.release import read_release
from tfm.interop.stablehlo import StableHLOError, build_programs, write_stablehlo
from tfm.models.layout import to_layout
from tfm.special_ids import EOS
from tfm.translator import Translator

pytest.importorskip('flatbuffers')
DOCUMENT = Path(tfm.__file__).parents[1] / 'docs' / 'export.md'
SENTENCES = ['a man sees two dogs', 'two', 'his dog is walking']


def test_the_example_of_the_document_translates_without_tfm(make_release, tmp_path):
  release = make_release(norm='pre')
  folder = write_stablehlo(release, tmp_path / 'out', platforms=['cpu'])
  assert (folder / 'step.bin').stat().st_size < 2**20
  example = re.search(r'```python\n(.*?)```', DOCUMENT.read_text(), re.DOTALL)[1]
  assert len(example.splitlines()) <= 35
  blocked = "import sys; sys.modules['tfm'] = sys.modules['flax'] = None\n" + example
  source = release.tokenizers.source
  ended = subprocess.run([sys.executable, '-c', blocked, str(folder), json.dumps(source.encode_batch(SENTENCES))],
                         capture_output=True, text=True, cwd=tmp_path)
  assert ended.returncode == 0, ended.stderr
  ours = Translator(release.model, release.params, release.tokenizers, DecodingConfig(beam_size=1)).translate(SENTENCES)
  target = release.tokenizers.target
  assert [target.tokens(ids) for ids in json.loads(ended.stdout)] == [translation.tokens for translation in ours]
  assert len({tuple(translation.tokens) for translation in ours}) > 1, 'a model that ignores its source shows nothing'
  assert read_release(folder).config == release.config


@pytest.mark.parametrize('changes', [
    dict(positions='relative', relative_buckets=8, relative_max_distance=20, num_kv_heads=2, scan_layers=True),
    dict(positions='learned', max_positions=40, tying='none', pad_id=None, dtype='bfloat16'),
    dict(encoder_layers=0, positions='rope', window=3, norm='sandwich', attention_sinks=True),
    dict(encoder_layers=0, positions='alibi', experts=2, experts_per_token=1, biases='none'),
])
def test_steps_give_the_logits_of_teacher_forcing(changes, make_release):
  release = make_release(**changes)
  batch = 2 if release.config.model.experts else None
  programs, weights = build_programs(release, ('cpu',), batch), release.named()
  ids_BxT = np.random.default_rng(0).integers(4, 280, (2, 5)).astype(np.int32)
  source_BxS = np.array([[9, 8, 7, EOS], [6, EOS, 0, 0]], np.int32)
  sources = (source_BxS,) if 'encode' in programs else ()
  expected = jax.jit(release.model.apply)({'params': to_layout(release.params, 'unrolled')}, *sources, ids_BxT)
  memory = programs['encode'].call(weights, source_BxS) if sources else {}
  (_, _, _, _, past), _ = jax.tree.unflatten(programs['step'].in_tree, programs['step'].in_avals)
  past = {name: jnp.zeros((2, aval.shape[1], 7, aval.shape[3]), aval.dtype) for name, aval in past.items()}
  for t in range(5):
    logits, past = programs['step'].call(weights, ids_BxT[:, t], np.int32(t), memory, past)
    np.testing.assert_allclose(logits, expected[:, t], atol=0.1 if changes.get('dtype') else 1e-4)


def test_a_fixed_batch_and_other_platforms(make_release):
  programs = build_programs(make_release(), ('cuda', 'tpu'), batch=2)
  for program in programs.values():
    assert program.platforms == ('cuda', 'tpu')
  assert programs['encode'].in_avals[-1].shape[0] == 2
  assert not isinstance(programs['encode'].in_avals[-1].shape[1], int)


def test_what_has_no_programs(make_release, tmp_path):
  with pytest.raises(StableHLOError, match='encoder-only model writes no tokens'):
    write_stablehlo(make_release(decoder_layers=0), tmp_path / 'out')
  for changes, batch in ((dict(encoder_layers=0), None), ({}, 2)):
    with pytest.raises(StableHLOError, match=r'needs a fixed batch \(--batch\) and a decoder-only model'):
      write_stablehlo(make_release(experts=2, biases='none', **changes), tmp_path / 'out', batch=batch)
  with pytest.raises(StableHLOError, match='no platform metal; choose from cpu, cuda, tpu and rocm'):
    write_stablehlo(make_release(), tmp_path / 'out', platforms=['cpu', 'metal'])
  assert not (tmp_path / 'out').exists()
