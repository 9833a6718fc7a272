"""What ranks compare before they act."""

import torch
from torch import fx

from moe_compile.optimize import graph_lines


def test_graphs_of_ranks_with_other_devices_are_the_same() -> None:
    def lines(device: torch.device) -> list[str]:
        graph = fx.Graph()
        graph.output(graph.call_function(torch.arange, (3,), {"device": device}))
        return graph_lines(graph, device)

    assert lines(torch.device("cuda:0")) == lines(torch.device("cuda:1"))
    assert "device: cuda" in "".join(lines(torch.device("cuda:1")))
