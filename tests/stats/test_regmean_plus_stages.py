"""The order in which RegMean++ goes through a model, and which parameters a part of it uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from raymerge.stats.exchange import ThreadExchange, ThreadMeeting
from raymerge.stats.parameter_use import ParameterUse
from raymerge.stats.regmean_plus_stages import stages_of


def test_an_encoder_decoder_has_a_lead_in_before_each_stack() -> None:
    blocks = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    found = [(each.kind, each.begin, each.num_pushed, each.end, each.block) for each in stages_of(blocks)]
    assert found == [
        ("lead_in", 0, 0, 0, None),
        ("block", 0, 0, 1, 0),
        ("block", 0, 1, 2, 1),
        ("lead_in", 1, 2, 2, None),
        ("block", 2, 2, 3, 2),
        ("block", 2, 3, 4, 3),
        ("tail", 3, 4, None, None),
    ]
    assert [each.label(4) for each in stages_of(blocks)][:3] == ["embeddings", "layer 1 of 4", "layer 2 of 4"]


def test_every_block_is_pushed_once_and_in_order() -> None:
    for num_blocks in (1, 2, 7):
        stages = stages_of([f"layers.{i}" for i in range(num_blocks)])
        assert [i for each in stages for i in range(each.begin, each.num_pushed)] == [*range(num_blocks)]
        assert [each.block for each in stages if each.block is not None] == [*range(num_blocks)]


def test_a_parameter_that_is_read_as_a_table_counts_as_used() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(3, 4)
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.token = torch.nn.Parameter(torch.zeros(1, 4))

        def forward(self, x: torch.Tensor) -> Any:
            return self.first(torch.cat([x, self.token.expand(1, -1), self.table.weight]))

    model = Model()
    with ParameterUse({id(parameter): name for name, parameter in model.named_parameters()}) as watch:
        model(torch.ones(2, 4))
    assert watch.used == {"token", "table.weight", "first.weight", "first.bias"}


def test_workers_of_one_candidate_exchange_among_themselves(run_together: Callable[..., Any]) -> None:
    meeting = ThreadMeeting(4)
    totals = [torch.full((3,), float(10**rank)) for rank in range(4)]
    groups = [(0, 2), (1, 3), (0, 2), (1, 3)]
    owners = [2, 1, 2, 1]
    run_together(
        [
            lambda rank=rank: ThreadExchange(meeting, rank).reduce(totals[rank], owners[rank], groups[rank])
            for rank in range(4)
        ]
    )
    assert totals[2].tolist() == [101.0] * 3
    assert totals[1].tolist() == [1010.0] * 3
