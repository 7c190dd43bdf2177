from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tfm
from tfm.interop.release import ReleaseError, new_folder, read_release, write_release
from tfm.models.layout import to_layout
from tfm.pipeline import read
from tfm.special_ids import SpecialIds
from tfm.training.run_folder import RunFolderError


def assert_same(one, other) -> None:
  jax.tree.map(np.testing.assert_array_equal, to_layout(one.params, 'unrolled'), to_layout(other.params, 'unrolled'))
  assert (one.config, one.vocab_sizes, one.special) == (other.config, other.vocab_sizes, other.special)


@pytest.mark.parametrize('changes', [dict(scan_layers=True, encoder_layers=2), dict(tying='none', biases='all'),
                                     dict(encoder_layers=0, positions='relative'), dict(decoder_layers=0, pooler=True)])
def test_what_is_written_is_read(changes, make_release, tmp_path):
  release = make_release(**changes)
  found = read_release(write_release(release, tmp_path / 'out'))
  assert_same(release, found)
  assert found.tokenizers.source.encode('a dog') == release.tokenizers.source.encode('a dog')
  assert {file.name for file in (tmp_path / 'out').iterdir()} == {'config.json', 'tokenizer', 'model.safetensors'}
  assert list(tmp_path.iterdir()) == [tmp_path / 'out']


def test_other_special_ids_and_no_tokenizers(make_release, tmp_path):
  release = dataclasses.replace(make_release(), tokenizers=None, special=SpecialIds(start=2, ends=(2, 5), forced=(7,)))
  found = read_release(write_release(release, tmp_path / 'out'))
  assert_same(release, found)
  assert found.tokenizers is None
  with pytest.raises(ReleaseError, match='has no tokenizer'):
    tfm.load(tmp_path / 'out')


def test_load_opens_it_without_orbax(numbers_run, tmp_path):
  translator = tfm.load(numbers_run)
  folder = write_release(read(numbers_run), tmp_path / 'out')
  code = f"""if True:
    import sys
    sys.modules['orbax'] = sys.modules['orbax.checkpoint'] = None
    import json, tfm
    print(json.dumps([t.text for t in tfm.load({str(folder)!r}).translate(['forty-two', 'ninety-six'])]))"""
  ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert ended.returncode == 0, ended.stderr
  texts = [translation.text for translation in translator.translate(['forty-two', 'ninety-six'])]
  assert json.loads(ended.stdout) == texts and all(texts)
  assert tfm.load(folder).decoding == translator.decoding
  with pytest.raises(ReleaseError, match="one set of weights; leave out step='best'"):
    tfm.load(folder, 'best')


WRONG = (r"decoder_norm/scale is missing; encoder/extra is not of this model; "
         r"decoder/layers_0/mlp/inner/bias is F32\[3\], not F32\[24\]")


def test_all_that_is_wrong_is_said_before_anything_is_written(make_release, tmp_path):
  release = make_release(norm='pre')
  del release.params['decoder_norm']['scale']
  release.params['encoder']['extra'] = np.zeros(2, np.float32)
  release.params['decoder']['layers_0']['mlp']['inner']['bias'] = np.zeros(3, np.float32)
  with pytest.raises(ReleaseError, match=f'The parameters are not those of the model in the config: {WRONG}'):
    write_release(release, tmp_path / 'out')
  assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_is_said_before_anything_is_used(make_release, tmp_path):
  file = write_release(make_release(norm='pre'), tmp_path / 'out') / 'model.safetensors'
  with safe_open(file, framework='numpy') as weights:
    header = weights.metadata()
  arrays = load_file(file)
  del arrays['decoder_norm/scale']
  arrays['encoder/extra'] = np.zeros(2, np.float32)
  arrays['decoder/layers_0/mlp/inner/bias'] = np.zeros(3, np.float32)
  arrays['decoder/layers_0/mlp/outer/bias'] = arrays['decoder/layers_0/mlp/outer/bias'].astype(np.float16)
  save_file(arrays, file, header)
  with pytest.raises(ReleaseError, match=f'{WRONG}; decoder/layers_0/mlp/outer/bias is F16'):
    read_release(tmp_path / 'out')

  save_file(arrays, file, {**header, 'format': '99', 'tfm': '7.0'})
  with pytest.raises(ReleaseError, match=r'format 99, written by tfm 7\.0.*install a newer tfm'):
    read_release(tmp_path / 'out')
  for content in (b'', file.read_bytes()[:-5], b'{' * 100):
    file.write_bytes(content)
    with pytest.raises(ReleaseError, match='is missing or damaged'):
      read_release(tmp_path / 'out')
  save_file(arrays, file)
  with pytest.raises(ReleaseError, match='is missing or damaged'):
    read_release(tmp_path / 'out')


def test_a_folder_that_exists_or_does_not(make_release, tmp_path):
  with pytest.raises(ReleaseError, match='exists; choose another folder'):
    write_release(make_release(), tmp_path)
  with pytest.raises(RunFolderError, match='There is no folder'):
    read_release(tmp_path / 'missing')


def test_a_new_folder_is_whole_or_absent(tmp_path):
  with pytest.raises(KeyError), new_folder(tmp_path / 'a' / 'out') as building:
    (building / 'half').touch()
    raise KeyError
  assert list((tmp_path / 'a').iterdir()) == []
