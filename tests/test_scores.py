from __future__ import annotations

import pytest
import sacrebleu
import sacremoses

from tfm.scores import Score, bleu, chrf, exact_match, paired_bootstrap, tokenized_bleu

REFERENCES = ['Ein Hund läuft über den grünen Rasen.', 'Zwei Männer sitzen auf einer Bank.',
              "Er sagt: „Das ist's!“", 'Die Katze schläft in der warmen Sonne.'] * 5
GOOD = ['Ein Hund rennt über den grünen Rasen.', 'Zwei Männer sitzen auf einer Bank.',
        "Er sagt: „Das ist's.“", 'Die Katze liegt in der warmen Sonne.'] * 5
BAD = ['Ein Hund rennt auf Gras.', 'Zwei Menschen sitzen auf der Bank.', 'Er sagt das.',
       'Katze in der warmen Sonne.'] * 4 + GOOD[:4]


@pytest.mark.parametrize(('ours', 'theirs'), [(bleu, sacrebleu.corpus_bleu), (chrf, sacrebleu.corpus_chrf)])
def test_figures_are_those_of_sacrebleu(ours, theirs):
  for hypotheses in (GOOD, BAD):
    assert ours(hypotheses, REFERENCES).value == theirs(hypotheses, [REFERENCES]).score
  assert ours(REFERENCES, REFERENCES).value == pytest.approx(100)
  assert 0 < ours(BAD, REFERENCES).value < ours(GOOD, REFERENCES).value < 100


def test_signatures_say_how():
  assert {'tok:13a', 'case:mixed', 'nrefs:1', f'version:{sacrebleu.__version__}'} <= set(
      bleu(GOOD, REFERENCES).signature.split('|'))
  assert {'nc:6', 'nw:0'} <= set(chrf(GOOD, REFERENCES).signature.split('|'))
  assert 'bs:1000' in bleu(GOOD, REFERENCES, bootstrap=True).signature.split('|')


def test_tokenized_figure_is_that_of_lower_cased_moses_tokens():
  tokenizer, normalizer = sacremoses.MosesTokenizer(lang='de'), sacremoses.MosesPunctNormalizer(lang='de')

  def tokens(lines):
    return [' '.join(tokenizer.tokenize(normalizer.normalize(line.lower()), escape=False)) for line in lines]

  assert tokens(['Er sagt: „Das geht!“']) == ['er sagt : " das geht ! "']
  expected = sacrebleu.corpus_bleu(tokens(GOOD), [tokens(REFERENCES)], tokenize='none', force=True).score
  assert tokenized_bleu(GOOD, REFERENCES, 'de').value == pytest.approx(expected)
  shouted = [line.upper() for line in GOOD]
  assert tokenized_bleu(shouted, REFERENCES, 'de').value == tokenized_bleu(GOOD, REFERENCES, 'de').value
  assert bleu(shouted, REFERENCES).value < bleu(GOOD, REFERENCES).value
  assert 'lower-cased Moses' in tokenized_bleu(GOOD, REFERENCES, 'de').name


def test_without_moses_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'sacremoses', None)
  with pytest.raises(ModuleNotFoundError, match=r"pip install 'tfm\[moses\]'"):
    tokenized_bleu(GOOD, REFERENCES, 'de')


def test_exact_match_counts_equal_sentences():
  assert exact_match(['a', 'b', 'c', ''], ['a', 'x', 'c', 'd']) == 50.0
  assert exact_match(REFERENCES, REFERENCES) == 100.0
  with pytest.raises(ValueError):
    exact_match(['a'], ['a', 'b'])


@pytest.mark.parametrize('score', [bleu, chrf])
def test_bootstrap_interval_is_that_of_sacrebleu(score):
  found = score(BAD, REFERENCES, bootstrap=True)
  metric = sacrebleu.BLEU() if score is bleu else sacrebleu.CHRF()
  printed = metric.corpus_score(BAD, [REFERENCES], n_bootstrap=1000).format()
  assert found.interval > 0 and f'± {found.interval:.2f})' in printed
  assert found.value == score(BAD, REFERENCES).value
  assert score(BAD, REFERENCES).interval is None
  assert score(REFERENCES, REFERENCES, bootstrap=True).interval == pytest.approx(0, abs=1e-5)
  assert score(['q'] * 3, ['ö'] * 3, bootstrap=True).interval == 0


def test_a_bootstrap_in_which_some_resamples_have_no_match_at_all():
  """With seven sentences of which one matches, a third of the resamples score 0."""
  found = chrf(['q'] * 6 + ['hello'], ['ö'] * 6 + ['hello world'], bootstrap=True)
  assert 0 < found.value < 100 and 0 < found.interval < 50


def test_a_score_prints_itself_with_its_signature():
  assert str(Score('BLEU', 12.345, 'tok:13a')) == 'BLEU 12.35  tok:13a'
  assert str(Score('BLEU', 12.345, 'tok:13a', 1.005)).startswith('BLEU 12.35 +- 1.00  tok')


def test_paired_bootstrap_compares_with_the_first():
  *table, bleu_signature, chrf_signature = paired_bootstrap({'one': GOOD, 'two': BAD, 'same': GOOD},
                                                            REFERENCES).splitlines()
  assert [line.split(':')[0] for line in table] == ['one', 'two', 'same']
  for line, hypotheses in zip(table, (GOOD, BAD, GOOD)):
    assert f'BLEU {bleu(hypotheses, REFERENCES).value:.2f}' in line
    assert f'chrF2 {chrf(hypotheses, REFERENCES).value:.2f}' in line
  assert '(p = ' not in table[0], 'the baseline is not compared with itself'
  assert float(table[1].split('(p = ')[1].split(')')[0]) < 0.05
  # sacreBLEU gives equal outputs p = 0.001, its least.
  assert '(p = ' not in table[2] and 'same output as the first' in table[2]
  assert bleu_signature.startswith('BLEU: ') and 'bs:1000' in bleu_signature
  assert chrf_signature.startswith('chrF2: ')
