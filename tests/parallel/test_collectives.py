from __future__ import annotations

import dataclasses

import pytest

from tfm.parallel.chips import CHIPS
from tfm.parallel.collectives import Collective, collectives

HLO = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %gathered = f32[32,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %x)
}

%outer (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %loop = (s32[], f32[8,4]{1,0}) while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %moved = bf16[10]{0} collective-permute(%x), source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %x)
}

%c (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,4]) -> f32[] {
  %twice = (s32[], f32[8,4]{1,0}) while(%p), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"2"}}
  %both = (f32[100]{0}, /*index=1*/bf16[50]{0}) all-reduce(%u, %v), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %part = f32[25]{0} reduce-scatter(%u), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, to_apply=%add
  %half = f32[6]{0} all-reduce(%u), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, to_apply=%add
  %later = (f32[8]{0}, f32[32]{0}) all-gather-start(%u), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %alone = f32[100]{0} all-reduce(%u), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %used = f32[] reduce(%both.all-reduce, %zero), dimensions={0}, to_apply=%add
}
"""


def test_every_exchange_is_found_with_its_bytes_its_group_and_its_trips():
  assert set(collectives(HLO)) == {
      Collective('all-gather', 512, group=4, stride=2, count=6),
      Collective('collective-permute', 20, group=4, stride=2, count=2),
      Collective('all-reduce', 500, group=4, stride=1, count=1),
      Collective('reduce-scatter', 400, group=4, stride=2, count=1),
      Collective('all-reduce', 24, group=4, stride=2, count=1),
      Collective('all-gather', 128, group=4, stride=1, count=1),
  }


def test_a_loop_without_a_count_is_refused_only_where_it_matters():
  unknown = HLO.replace(', backend_config={"known_trip_count":{"n":"3"}}', '')
  with pytest.raises(ValueError, match='trips of the loop are not known'):
    collectives(unknown)
  assert collectives('\n'.join(line for line in unknown.splitlines() if 'all-gather(' not in line))
  with pytest.raises(ValueError, match='no ENTRY'):
    collectives('nothing')
  with pytest.raises(ValueError, match='not known here'):
    collectives(HLO.replace('replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply', 'replica_groups=?, to_apply'))


def test_what_a_ring_sends():
  sent = {kind: Collective(kind, 800, group=8, stride=1, count=2).sent
          for kind in ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')}
  assert sent == {'all-reduce': 2800, 'all-gather': 1400, 'reduce-scatter': 1400, 'all-to-all': 1400,
                  'collective-permute': 1600}


@pytest.mark.parametrize('kind', ['all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute'])
def test_inside_a_domain_bytes_go_at_the_speed_of_its_links(kind):
  chip = dataclasses.replace(CHIPS['h100'], link=100.0, network=1.0)
  near, far = Collective(kind, 800, group=4, stride=2), Collective(kind, 800, group=16, stride=1)
  assert near.seconds(chip) == pytest.approx(near.sent / 100)
  assert far.seconds(chip) > near.seconds(chip)
  # Neighbours that are a domain apart never meet inside.
  apart = Collective(kind, 800, group=4, stride=8)
  assert apart.seconds(chip) == pytest.approx(apart.sent / 1)


def test_reductions_leave_the_domain_with_one_share_for_each_chip():
  chip = dataclasses.replace(CHIPS['h100'], link=1e30, network=1.0)  # 2 domains of 8
  assert Collective('all-reduce', 800, group=16, stride=1).seconds(chip) == pytest.approx(2 * 800 / 8 / 2)
