"""The claims about attention that the library grew from, one experiment each (E1 to E14), by name.

    result = CLAIMS['E9'].run(scale='cpu', seed=0)
    result.verdict, result.measured, result.control; result.draw().savefig('E9.png')

Every experiment states what had to be found, measures it, and has a control that must fail. A claim that fails, or for
which the models of this scale are too small, is a result like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from tfm.analysis.result import Result

Scale = Literal['cpu', 'accel']


@dataclass(frozen=True)
class Claim:
  """An experiment, imported when it is run."""

  says: str
  """In a few words."""
  where: str
  """Module of tfm.analysis, and function."""
  trains: bool = False
  """Minutes, not seconds."""
  drawn: bool = True
  """False: nothing in it is random, so that every seed gives the same."""
  options: tuple[tuple[str, Any], ...] = ()
  """Further arguments of the function."""

  @property
  def scales(self) -> bool:
    """Whether there is more to see at the scale of an accelerator."""
    return self.where.startswith(('long_range_recall', 'long_range_regular', 'alignment', 'memorisation',
                                  'linguistic_layers', 'treebank_layers', 'overconfidence', 'hybrids'))

  def run(self, scale: Scale = 'cpu', seed: int = 0) -> Result:
    """Measure; the seeds of experiments that use several are this one and those after it.

    Raises:
      ValueError: the experiment is the same at every scale, and another than 'cpu' is asked for.
    """
    module, _, function = self.where.partition('.')
    if scale != 'cpu' and not self.scales:
      raise ValueError(f"{self.where} is the same at every scale; leave scale='{scale}' out.")
    options = (dict(self.options) | ({'scale': scale} if self.scales else {}) | ({'seed': seed} if self.drawn else {}))
    return getattr(import_module(f'tfm.analysis.{module}'), function)(**options)


CLAIMS: Mapping[str, Claim] = {
    'E1': Claim('attention is score, alignment and weighted sum', 'general_model.run_general_model'),
    'E2': Claim('query, key and value have roles', 'attention_experiments.run_roles', trains=True),
    'E3': Claim('who asks and who answers is not symmetric', 'attention_experiments.run_swapped'),
    'E3 trained': Claim('which side asks decides what is learned', 'few_shot.run_few_shot', trains=True),
    'E4': Claim('attention is a soft dictionary', 'attention_experiments.run_dictionary'),
    'E5': Claim('scores want 1 / sqrt(d_k)', 'attention_experiments.run_scale'),
    'E6': Claim('attention aligns, a fixed vector does not', 'alignment_experiment.run', trains=True),
    'E7a': Claim('gradients fall with distance in an RNN', 'long_range_structure.gradient_by_distance',
                 options=(('seeds', 5),)),
    'E7b': Claim('a CNN sees as far as its layers reach', 'long_range_structure.receptive_fields'),
    'E7c copy': Claim('an RNN forgets what is far, copying', 'long_range_recall.recall_by_distance', trains=True,
                      options=(('task', 'copy'),)),
    'E7c first token': Claim('an RNN forgets what is far, the first token', 'long_range_recall.recall_by_distance',
                             trains=True, options=(('task', 'first-token recall'),)),
    'E7c marked': Claim('an RNN forgets what is far, a marked token', 'long_range_recall.recall_by_distance',
                        trains=True, options=(('task', 'marked recall'),)),
    'E7c associative': Claim('looking up needs attention', 'long_range_recall.associative_recall_by_distance',
                             trains=True),
    'E7c width': Claim('an RNN remembers as much as its state is wide', 'long_range_recall.memory_width', trains=True),
    'E7c parity': Claim('where attention should lose: parity', 'long_range_regular.parity', trains=True),
    'E7c dyck': Claim('where attention should lose: brackets', 'long_range_regular.dyck', trains=True),
    'E7d': Claim('an RNN prefers what is recent', 'long_range_recall.recency_bias', trains=True),
    'E7e': Claim('attention costs the square of the length', 'long_range_structure.cost_by_length',
                 drawn=False),
    'E8': Claim('self, cross and masked attention', 'structures.run_structures', trains=True),
    'E9': Claim('attention alone loses rank', 'rank_collapse.run_rank_collapse'),
    'E10': Claim('surface, syntax and meaning arise in this order', 'linguistic_layers.run_linguistic_layers',
                 trains=True),
    'E10 treebank': Claim('surface, syntax and meaning, in a treebank', 'treebank_layers.run_treebank_layers',
                          trains=True),
    'E11': Claim('deep attention memorises', 'memorisation.run_memorisation', trains=True),
    'E12': Claim('the last layer guards against overconfidence', 'overconfidence.run_overconfidence', trains=True),
    'E13': Claim('convolution and attention do more together', 'hybrids.run_hybrids', trains=True),
    'E14': Claim('weights that follow the input', 'mixing.run_mixing'),
}
"""By the numbers of the experiments."""
