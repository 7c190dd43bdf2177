"""config.json and generation_config.json of Hugging Face: what is read, what does not matter, what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tfm.errors import UserError

MOST_POSITIONS = 4096
"""Written where Hugging Face wants a limit and the model has none."""

ACTIVATIONS = {'relu': 'relu', 'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
               'gelu_pytorch_tanh': 'gelu_tanh', 'silu': 'silu', 'swish': 'silu'}
GATES = {'gelu': 'geglu', 'gelu_new': 'geglu_tanh', 'gelu_pytorch_tanh': 'geglu_tanh', 'silu': 'swiglu',
         'swish': 'swiglu'}
THEIR_ACTIVATION = {'relu': 'relu', 'gelu': 'gelu', 'gelu_tanh': 'gelu_new', 'silu': 'silu', 'swiglu': 'silu',
                    'geglu': 'gelu', 'geglu_tanh': 'gelu_new'}

NO_MATTER = frozenset("""
    _attn_implementation_autoset _name_or_path _num_labels architectures attention_probs_dropout_prob bos_token_id
    classif_dropout classifier_dropout cls_token_id decoder_layerdrop decoder_start_token_id directionality dtype
    embd_pdrop encoder_layerdrop eos_token_id finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label init_std initializer_factor initializer_range label2id mask_token_id
    max_position_embeddings model_type n_ctx n_positions num_hidden_layers num_labels output_attentions
    output_hidden_states output_past pad_token_id pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type problem_type reorder_and_upcast_attn resid_pdrop return_dict sep_token_id
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params
    tokenizer_class torch_dtype torchscript transformers_version use_cache vocab_size
    add_bias_logits extra_pos_embeddings bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size force_bos_token_to_be_generated length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
""".split())
"""Fields of config.json that change no logits: of training, of searches, read elsewhere (special ids, `vocab_size`), or
of heads that are known by their weights."""


class HuggingFaceError(UserError):
  """A folder of Hugging Face, or a model for one, with something that the other side has not."""


class Fields:
  """A table of fields, and which of them were read."""

  def __init__(self, values: Mapping[str, Any], where: str = 'config.json'):
    self.values, self._where, self._read = values, where, set(NO_MATTER)

  def __call__(self, name: str, *default: Any) -> Any:
    """The value; without a default the field must be there."""
    self._read.add(name)
    if name not in self.values and not default:
      raise HuggingFaceError(f"{self._where} has no '{name}'; restore the file from a copy.")
    return self.values.get(name, *default)

  def only(self, name: str, *allowed: Any) -> Any:
    """The value (by default the first allowed), if our model can do it."""
    value = self(name, allowed[0])
    if value not in allowed:
      raise HuggingFaceError(f'{self._where} has {name}={value!r}; the Transformer of tfm can only do '
                             f'{" or ".join(map(repr, allowed))}.')
    return value

  def named(self, name: str, names: Mapping[str, str], default: str) -> str:
    """Our name of what the value says."""
    return names[self.only(name, *dict.fromkeys([default, *names]))]

  def same(self, *names: str) -> Any:
    """The one value of several fields."""
    values = [self(name) for name in names]
    if len(set(values)) > 1:
      raise HuggingFaceError(f'{self._where} has {", ".join(f"{n}={v!r}" for n, v in zip(names, values))}; the '
                             'Transformer of tfm has one value for both.')
    return values[0]

  def unread(self) -> list[str]:
    return sorted(set(self.values) - self._read)


def pad_id(f: Fields) -> int | None:
  value = f('pad_token_id', None)
  return None if value is None or value < 0 else value


def attention(ours: str, theirs: str, names: Iterable[str]) -> dict[str, str]:
  """Their module of each linear map of attention; `names` are those of queries, keys, values and output."""
  return {f'{ours}/{part}': f'{theirs}.{name}' for part, name in zip(('query', 'key', 'value', 'output'), names)}
