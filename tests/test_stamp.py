"""Which changes of a module a stamp notices."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from evc_fast.model.stamp import Stamp


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.second = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
        self.register_buffer("table", torch.randn(7, 6, generator=generator))
        self.register_buffer("absent", None)
        self.register_buffer("strided", torch.randn(6, 9, generator=generator).T[::2])
        self.register_buffer("single", torch.tensor(3.0))
        self.register_buffer("empty", torch.empty(0, 6))
        self.register_buffer("sixteen_bit", torch.randn(5, 5, generator=generator).bfloat16())
        self.register_buffer("ids", torch.arange(20))


def replace_parameter(m: Weights) -> None:
    m.first.weight = nn.Parameter(m.first.weight.detach().clone())


def step(m: Weights) -> None:
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(m.parameters(), lr=0.1).step()


def in_place(m: Weights) -> None:
    with torch.no_grad():
        m.first.weight[3, 2] += 1  # one element, which PyTorch counts


def reassign_data(m: Weights) -> None:
    m.first.weight.data = m.first.weight.data + 1


def reassign_equal_data(m: Weights) -> None:
    m.first.weight.data = m.first.weight.data.clone()


def transpose_data(m: Weights) -> None:
    m.first.weight.data = m.first.weight.data.t()


def transpose_in_place(m: Weights) -> None:
    with torch.no_grad():
        m.first.weight.t_()


def through_numpy(m: Weights) -> None:
    m.first.weight.detach().numpy()[:] = 2.0


def buffer_through_numpy(m: Weights) -> None:
    m.table.numpy()[:] *= 2.0


def strided_through_data(m: Weights) -> None:
    m.strided.data.mul_(2)


def replace_module(m: Weights) -> None:
    m.second[0] = nn.Linear(6, 4)


def fill_absent(m: Weights) -> None:
    m.absent = torch.ones(3)


def remove_buffer(m: Weights) -> None:
    m.table = None


def delete_buffer(m: Weights) -> None:
    del m.table


def load(m: Weights) -> None:
    m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()})


def assign(m: Weights) -> None:
    m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True)


def data_of_whole(m: Weights) -> None:
    m.first.weight.data.mul_(1.5)


def data_of_one_in_few(m: Weights) -> None:
    m.second[1].bias.data[3].add_(1)  # fewer values than are sampled: all of them are


def data_of_single(m: Weights) -> None:
    m.single.data.add_(1)


def data_of_16_bit(m: Weights) -> None:
    m.sixteen_bit.data.neg_()


def data_of_integers(m: Weights) -> None:
    m.ids.data.add_(1)


def data_of_last(m: Weights) -> None:
    m.table.data[-1, -1] += 1


def to_float64(m: Weights) -> None:
    m.to(torch.float64)


def to_bfloat16(m: Weights) -> None:
    m.to(torch.bfloat16)


CHANGES: list[Callable[[Weights], object]] = [
    replace_parameter,
    step,
    in_place,
    reassign_data,
    reassign_equal_data,
    transpose_data,
    transpose_in_place,
    through_numpy,
    buffer_through_numpy,
    strided_through_data,
    replace_module,
    fill_absent,
    remove_buffer,
    delete_buffer,
    load,
    assign,
    data_of_whole,
    data_of_one_in_few,
    data_of_single,
    data_of_16_bit,
    data_of_integers,
    data_of_last,
    to_float64,
    to_bfloat16,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_is_noticed(change):
    module = Weights()
    stamp = Stamp(module)
    assert stamp.matches()
    assert stamp.matches(), "looking must not change it"
    change(module)
    assert not stamp.matches()
    assert Stamp(module).matches(), "the next stamp must take the module as it now is"


def test_what_changes_nothing_is_no_change():
    module = Weights()
    stamp = Stamp(module)
    module.eval().train()
    module.requires_grad_(False).requires_grad_(True)
    module.first(torch.randn(2, 6)).sum().backward()
    module.zero_grad()
    module.state_dict()
    with torch.inference_mode():
        module.first(torch.randn(2, 6))
        assert stamp.matches()
    assert stamp.matches()


@pytest.mark.parametrize("change", [lambda t: t.mul_(2), lambda t: t[3, 2].add_(1)], ids=["all", "one"])
def test_tensors_of_inference_mode_have_no_count_and_are_read_whole(change: Callable[[Tensor], Tensor]):
    with torch.inference_mode():
        module = Weights()
        stamp = Stamp(module)
        assert stamp.matches()
        change(module.first.weight.data)
        assert not stamp.matches()


@pytest.mark.parametrize("shape", [(1000,), (9,), (40, 50), (30_001,)], ids=str)
def test_writes_around_the_count_are_found_by_evenly_spaced_values_with_both_ends(shape):
    module = nn.Module()
    module.register_buffer("x", torch.zeros(shape))
    flat = module.x.view(-1)
    stamp, found = Stamp(module), []
    for i in range(flat.numel()):
        flat.data[i] = 1
        if not stamp.matches():
            found.append(i)
        flat.data[i] = 0
        assert stamp.matches()
    assert len(found) == min(16, flat.numel())
    assert (found[0], found[-1]) == (0, flat.numel() - 1)
    assert max(b - a for a, b in itertools.pairwise(found)) <= 2 * flat.numel() / 15


def test_nan_weights_are_equal_to_themselves():
    module = Weights()
    module.first.weight.data[0, 0] = float("nan")
    module.strided.data[0, 0] = float("nan")
    assert Stamp(module).matches()


def test_shared_tensors_and_modules():
    module = Weights()
    module.second.append(module.first)
    module.second[0].weight = nn.Parameter(module.first.weight[:4])
    stamp = Stamp(module)
    assert stamp.matches()
    with torch.no_grad():
        module.first.weight.mul_(2)
    assert not stamp.matches()
