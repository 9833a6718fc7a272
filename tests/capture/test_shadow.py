from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from moe_compile.capture.shadow import cast_shadow


def test_an_operator_runs_once_for_arguments_of_one_form() -> None:
    shadow = cast_shadow(nn.Linear(4, 4))
    with shadow.mode:
        x = torch.empty(shadow.batch, shadow.sequence, 4)
        first = F.relu(x)
        with mock.patch.object(FakeTensorMode, "__torch_dispatch__", side_effect=AssertionError):
            again = F.relu(torch.empty(shadow.batch, shadow.sequence, 4))
    assert str(again.shape) == str(first.shape)
    assert again is not first


def test_other_forms_are_run() -> None:
    shadow = cast_shadow(nn.Linear(4, 4))
    with shadow.mode:
        x = torch.empty(shadow.batch, shadow.sequence, 4)
        assert F.relu(x).dtype == torch.float32
        assert F.relu(x.bfloat16()).dtype == torch.bfloat16
        assert str(F.relu(x.transpose(0, 1)).shape) != str(F.relu(x).shape)
