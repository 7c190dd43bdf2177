from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from tfm.analysis.cross_attention import cross_attention
from tfm.config import DecodingConfig, TransformerConfig
from tfm.decoding.greedy import greedy_search
from tfm.decoding.length_penalty import length_penalty
from tfm.models.build import build_model, initialize, with_layout
from tfm.models.layout import to_layout
from tfm.special_ids import BOS, EOS
from tfm.translator import Translation, TranslationError, Translator

SHORT = ['six', 'twelve', 'four']
LONG = ['forty-two', 'seventy-seven', 'eighty-three', 'ninety-six']
GREEDY = dict(beam_size=1)
BEAM = dict(beam_size=4, num_hypotheses=4)
DRAWS = dict(sampling_temperature=1.0, num_hypotheses=2, seed=3)
SEARCHES = {'greedy': GREEDY, 'beam': BEAM, 'sampling': DRAWS}


@pytest.fixture(scope='module')
def translator(numbers_run) -> Translator:
  return tfm.load(numbers_run)


@pytest.fixture(scope='module')
def found(translator) -> dict[str, list[Translation]]:
  """What each search makes of `LONG`."""
  return {name: translator.translate(LONG, **search) for name, search in SEARCHES.items()}


def assert_same(one: Translation, other: Translation) -> None:
  assert (one.source, one.source_tokens) == (other.source, other.source_tokens)
  assert [h.tokens for h in one.hypotheses] == [h.tokens for h in other.hypotheses]
  assert [(h.text, h.finished) for h in one.hypotheses] == [(h.text, h.finished) for h in other.hypotheses]
  for a, b in zip(one.hypotheses, other.hypotheses):
    np.testing.assert_allclose([a.score, a.log_prob], [b.score, b.log_prob], rtol=1e-5, atol=1e-5)


def ids_of(translator: Translator, tokens: list[str]) -> list[int]:
  return [translator.tokenizers.target.vocabulary().index(token) for token in tokens]


def padded(rows: list[list[int]]) -> np.ndarray:
  return np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], np.int32)


# -- what goes in comes out in its place ------------------------------------------------------------------------------


def test_order_and_count_are_kept_and_no_sentence_disturbs_another(translator):
  alone = {sentence: translator.translate([sentence])[0] for sentence in SHORT + LONG}
  mixed = ['forty-two', 'six', '', 'seventy-seven', 'twelve', 'six', ' \t ', 'ninety-six', 'four', 'forty-two']
  done = []
  together = translator.translate(mixed, progress=done.append)
  assert [translation.source for translation in together] == mixed
  for sentence, translation in zip(mixed, together):
    if sentence.strip():
      assert_same(translation, alone[sentence])
    else:
      assert (translation.text, translation.tokens, translation.source_tokens) == ('', [], [])
      assert translation.score == 0 and translation.hypotheses[0].finished
  assert len({translation.text for translation in alone.values()}) > 3, 'a model that ignores its source shows nothing'
  assert done == sorted(done) and done[-1] == len(mixed)


@pytest.mark.parametrize('name', SEARCHES)
def test_a_sentence_does_not_depend_on_its_batch(name, translator, found):
  search = SEARCHES[name]
  for place, sentence in enumerate(LONG):
    alone, = translator.translate([sentence], offset=place, **search)
    assert_same(alone, found[name][place])
  batches = []
  one_by_one = translator.with_decoding(batch_tokens=1).translate(LONG, progress=batches.append, **search)
  assert batches == [1, 2, 3, 4]
  for one, other in zip(one_by_one, found[name]):
    assert_same(one, other)


def test_no_text_makes_no_translation(translator):
  assert translator.translate([]) == []
  for nothing in translator.translate(['', '  ', '\n'], **BEAM, return_attention=True):
    assert [hypothesis.text for hypothesis in nothing.hypotheses] == [''] * 4
    assert nothing.attention.shape == (1, 2, 0, 0)


@pytest.mark.parametrize('name', ['greedy', 'beam'])
def test_equal_sentences_have_equal_translations(name, translator):
  first, *others = translator.translate([LONG[1]] * 4, **SEARCHES[name])
  for other in others:
    assert_same(first, other)


def test_text_that_looks_like_special_tokens_is_text(translator):
  strange = ['</s>', '<pad>', 'a\tb', '🙂two']
  together = translator.translate(strange)
  assert together[0].source_tokens == [*'</s>', '</s>'] and together[1].source_tokens == [*'<pad>', '</s>']
  for sentence, translation in zip(strange, together):
    source = translator.tokenizers.source
    ids = [source.vocabulary().index(token) for token in translation.source_tokens]
    assert ids[-1] == EOS and min(ids[:-1]) > 3 and source.decode(ids) == sentence
    assert_same(translation, translator.translate([sentence])[0])


# -- searches ---------------------------------------------------------------------------------------------------------


def test_n_best_is_sorted_distinct_and_full(found):
  for translation in found['beam']:
    assert len(translation.hypotheses) == 4
    assert len({tuple(h.tokens) for h in translation.hypotheses}) == 4
    ranks = [(h.finished, h.score) for h in translation.hypotheses]
    assert ranks == sorted(ranks, reverse=True)
  for translation in found['sampling']:
    scores = [h.score for h in translation.hypotheses]
    assert scores == sorted(scores, reverse=True) and scores == [h.log_prob for h in translation.hypotheses]


def test_the_best_one_is_the_translation(found):
  for translation in found['beam']:
    best = translation.hypotheses[0]
    assert (translation.text, translation.score, translation.tokens) == (best.text, best.score, best.tokens)
    assert translation.attention is None


def test_beam_size_one_is_greedy_search(translator, found):
  sources = [translator.tokenizers.source.encode(sentence) + [EOS] for sentence in LONG]
  variables, limits = {'params': translator.params}, [len(ids) + translator.decoding.extra_length for ids in sources]

  @jax.jit
  def greedy(source_BxS):
    memory = translator.model.apply(variables, source_BxS, method='encode')
    cache = translator.model.apply(variables, memory, max(limits), method='init_cache')
    return greedy_search(lambda tokens, cache: translator.model.apply(variables, tokens, memory, cache, method='step'),
                         cache, jnp.array(limits), max(limits))

  expected = greedy(padded(sources))
  for b, translation in enumerate(found['greedy']):
    ids = ids_of(translator, translation.tokens)
    assert ids == np.asarray(expected.tokens_BxL)[b, :len(ids)].tolist() and len(ids) == expected.lengths_B[b]
    np.testing.assert_allclose(translation.hypotheses[0].log_prob, expected.log_prob_B[b], rtol=1e-5)


def test_log_probabilities_are_those_of_teacher_forcing(translator, found):
  rows = [(sentence, hypothesis) for name in SEARCHES for sentence, translation in zip(LONG, found[name])
          for hypothesis in translation.hypotheses]
  source_RxS = padded([translator.tokenizers.source.encode(sentence) + [EOS] for sentence, _ in rows])
  labels_RxT = padded([ids_of(translator, hypothesis.tokens) for _, hypothesis in rows])
  inputs_RxT = np.concatenate([np.full_like(labels_RxT[:, :1], BOS), labels_RxT[:, :-1]], axis=1)

  @jax.jit
  def log_probs(params):
    logits_RxTxV = translator.model.apply({'params': params}, source_RxS, inputs_RxT)
    chosen_RxT = jnp.take_along_axis(jax.nn.log_softmax(logits_RxTxV), labels_RxT[..., None], axis=-1)[..., 0]
    return jnp.where(labels_RxT > 0, chosen_RxT, 0).sum(1)

  for (_, hypothesis), expected in zip(rows, log_probs(translator.params)):
    np.testing.assert_allclose(hypothesis.log_prob, expected, rtol=1e-4, atol=1e-4)


def test_score_is_log_probability_over_length_penalty(translator, found):
  decoding = translator.decoding
  assert decoding.length_penalty > 0
  for name in ('greedy', 'beam'):
    for hypothesis in (h for translation in found[name] for h in translation.hypotheses):
      penalty = length_penalty(len(hypothesis.tokens), decoding.length_penalty, decoding.length_penalty_form)
      np.testing.assert_allclose(hypothesis.score, hypothesis.log_prob / float(penalty), rtol=1e-5)
  plain = translator.translate(LONG, beam_size=1, length_penalty=0)
  for hypothesis in (translation.hypotheses[0] for translation in plain):
    assert hypothesis.score == hypothesis.log_prob


def test_samples_follow_their_seed(translator, found):
  for one, other in zip(found['sampling'], translator.translate(LONG, **DRAWS)):
    assert_same(one, other)
  other_seed = translator.translate(LONG, **{**DRAWS, 'seed': 4})
  assert [t.text for t in other_seed] != [t.text for t in found['sampling']]
  places = translator.translate([LONG[0]] * 4, **DRAWS)
  assert len({t.text for t in places}) > 1, 'each place draws for itself'


def test_sampling_from_the_most_probable_token_is_greedy(translator, found):
  for sample, greedy in zip(translator.translate(LONG, sampling_temperature=1.0, sampling_topk=1), found['greedy']):
    assert sample.tokens == greedy.tokens
    np.testing.assert_allclose(sample.score, greedy.hypotheses[0].log_prob, rtol=1e-5)


# -- a translation that has begun -------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['greedy', 'beam'])
def test_outputs_begin_with_their_prefixes(name, translator, found):
  prefixes = ['drei', '', 'siebenund', ' ü']
  search = {**SEARCHES[name], 'num_hypotheses': 1}
  forced = translator.translate(LONG, target_prefix=prefixes, **search)
  for prefix, translation in zip(prefixes, forced):
    assert translation.text.startswith(prefix) and len(translation.tokens) > len(prefix)
  assert_best_is_same(forced[1], found[name][1])


def assert_best_is_same(one: Translation, other: Translation) -> None:
  assert one.tokens == other.tokens
  np.testing.assert_allclose(one.score, other.score, rtol=1e-5)


def test_a_prefix_of_its_own_output_changes_nothing(translator, found):
  own = [translation.text for translation in found['greedy']]
  prefixes = [own[0], own[1][:9], '', own[3][:1]]
  for forced, free in zip(translator.translate(LONG, target_prefix=prefixes), found['greedy']):
    assert_same(forced, free)


# -- attention --------------------------------------------------------------------------------------------------------


def test_attention_is_that_of_the_sentence_alone(translator, found):
  together = translator.translate(LONG, **BEAM, return_attention=True)
  for translation, without in zip(together, found['beam']):
    assert_same(translation, without)
    for hypothesis in translation.hypotheses:
      assert hypothesis.attention.shape == (1, 2, len(hypothesis.tokens), len(translation.source_tokens))
      np.testing.assert_allclose(hypothesis.attention.sum(-1), 1, rtol=1e-5)
  alone, = translator.translate(LONG[2:3], **BEAM, return_attention=True)
  for one, other in zip(alone.hypotheses, together[2].hypotheses):
    np.testing.assert_allclose(one.attention, other.attention, atol=1e-5)

  # Row t belongs to the step that wrote token t, so that step had read <s> and the tokens before t.
  source = translator.tokenizers.source.encode(LONG[2]) + [EOS]
  inputs = [[BOS, *ids_of(translator, hypothesis.tokens)[:-1]] for hypothesis in alone.hypotheses]
  bare = cross_attention(translator.model, translator.params, padded([source] * 4), padded(inputs))
  for hypothesis, expected in zip(alone.hypotheses, bare):
    np.testing.assert_allclose(hypothesis.attention, expected[:, :, :len(hypothesis.tokens)], atol=1e-5)
  np.testing.assert_array_equal(alone.attention, alone.hypotheses[0].attention)


# -- limits -----------------------------------------------------------------------------------------------------------


def test_too_long_for_the_configured_limit_is_refused(translator):
  strict = translator.with_decoding(max_source_length=10)
  with pytest.raises(TranslationError, match=r'Sentence 3 has 14 tokens.*max_source_length=10'):
    strict.translate(['forty-two', '', 'seventy-seven'])
  with pytest.raises(TranslationError, match='Sentence 1003 '):
    strict.translate(['forty-two', '', 'seventy-seven'], offset=1000)
  assert strict.translate(['forty-two'])[0].text == translator.translate(['forty-two'])[0].text


def test_sinusoidal_positions_translate_any_length(translator):
  endless = ' '.join(['forty-two'] * 50)
  translation, = translator.translate([endless])
  assert len(translation.source_tokens) == 500 and translation.tokens
  assert translation.hypotheses[0].finished or len(translation.tokens) == 500 + translator.decoding.extra_length


def test_learned_positions_translate_up_to_their_table(translator):
  config = TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=8, d_ff=8, num_heads=1, positions='learned',
                             max_positions=12)
  vocabulary = translator.tokenizers.source.vocab_size
  model = build_model(config, vocabulary, vocabulary)
  learned = Translator(model, initialize(model, jax.random.key(0)), translator.tokenizers, DecodingConfig(beam_size=1))
  with pytest.raises(TranslationError, match=r'Sentence 1 has 14 tokens.*12 positions'):
    learned.translate(['seventy-seven'])
  with pytest.raises(TranslationError, match=r'prefix of sentence 1 has 12 tokens.*limit of 12'):
    learned.translate(['six'], target_prefix=['x' * 12])
  translation, = learned.translate(['seventy-one'])
  assert len(translation.source_tokens) == 12
  assert translation.hypotheses[0].finished or len(translation.tokens) == 12


def test_an_output_cut_at_the_limit_says_so(translator):
  cut = 0
  for translation in translator.with_decoding(extra_length=1).translate(['six', 'two', 'ten', 'one']):
    hypothesis = translation.hypotheses[0]
    limit = len(translation.source_tokens) + 1
    assert hypothesis.finished == (hypothesis.tokens[-1] == '</s>')
    assert len(hypothesis.tokens) == limit if not hypothesis.finished else len(hypothesis.tokens) <= limit
    cut += not hypothesis.finished
  assert cut, 'German is longer than this'


# -- what cannot be honoured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (dict(num_hypotheses=0), 'num_hypotheses is 0'),
    (dict(num_hypotheses=5, beam_size=4), 'num_hypotheses 5 exceeds beam_size 4'),
    (dict(beam_size=0), 'beam_size is 0'),
    (dict(length_penalty=-1.0), 'length_penalty is -1'),
    (dict(length_penalty=float('nan')), 'length_penalty is nan'),
    (dict(seed=2**63), 'seed is 9223372036854775808; give a number of 64 bits'),
    (dict(sampling_topk=3), 'need sampling_temperature'),
    (dict(sampling_topp=0.5), 'need sampling_temperature'),
    (dict(sampling_temperature=1.0, beam_size=4), 'does not search'),
    (dict(sampling_temperature=1.0, length_penalty=0.0), 'does not search'),
    (dict(sampling_temperature=0.0), 'sampling_temperature is 0.0'),
    (dict(sampling_temperature=1.0, sampling_topk=-1), 'sampling_topk -1'),
    (dict(sampling_temperature=1.0, sampling_topp=0.0), 'sampling_topp 0.0'),
    (dict(sampling_temperature=1.0, sampling_topp=1.1), 'sampling_topp 1.1'),
    (dict(target_prefix=['a']), '1 target prefixes for 2 sentences'),
    (dict(target_prefix='ab'), 'list of prefixes'),
    (dict(target_prefix=['', 'x' * 23]), 'prefix of sentence 2 has 23 tokens.*limit of 23'),
])
def test_arguments_that_contradict_are_refused(arguments, sentence, translator):
  with pytest.raises(TranslationError, match=sentence):
    translator.translate(['six', 'go'], **arguments)


def test_one_sentence_outside_a_list_is_refused(translator):
  with pytest.raises(TranslationError, match='list of sentences'):
    translator.translate('forty-two')


def test_an_empty_sentence_cannot_begin(translator):
  with pytest.raises(TranslationError, match="Sentence 2 is empty.*'drei'"):
    translator.translate(['six', ''], target_prefix=['', 'drei'])


# -- variants of a translator -----------------------------------------------------------------------------------------


def test_other_weights_and_other_settings_leave_the_first_as_it_was(translator, found):
  zeros = translator.with_params(jax.tree.map(jnp.zeros_like, translator.params))
  uniform = -np.log(translator.tokenizers.target.vocab_size)
  for translation in zeros.translate(LONG):
    np.testing.assert_allclose(translation.hypotheses[0].log_prob, uniform * len(translation.tokens), rtol=1e-4)
  assert translator.with_decoding(beam_size=4).translate(LONG, num_hypotheses=4)[0].text == found['beam'][0].text
  assert_same(translator.translate(LONG)[0], found['greedy'][0])
  with pytest.raises(TypeError):
    translator.with_decoding(no_such_setting=1)


def test_scanned_parameters_translate_alike(translator, found):
  scanned = Translator(with_layout(translator.model, True), to_layout(translator.params, 'scanned'),
                       translator.tokenizers, translator.decoding)
  for one, other in zip(scanned.translate(LONG), found['greedy']):
    assert_same(one, other)
