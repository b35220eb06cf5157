import copy

import torch
from torch import nn

from horsehuman.training.muon import Muon, orthogonalize


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def test_singular_values_become_one() -> None:
    for shape in [(24, 75), (128, 1152), (96, 27)]:
        values = torch.linalg.svdvals(
            orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        )
        assert values.min() > 0.95
        assert values.max() < 1.05


def test_convolutions_move_by_muon_and_the_rest_by_adamw() -> None:
    ours, plain = small_network(), small_network()
    before = ours[0].weight.detach().clone()
    train(ours, Muon(ours.parameters(), lr=0.01, weight_decay=0.0), 1, seed=1)
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0, betas=(0.9, 0.95))
    train(plain, adamw, 1, seed=1)
    assert torch.equal(ours[3].weight, plain[3].weight)
    expected = 0.2 * 27**0.5 * orthogonalize(plain[0].weight.grad.flatten(1))  # 4 x 27
    step = (before - ours[0].weight.detach()).flatten(1) / 0.01
    assert torch.allclose(step, expected, rtol=1e-3, atol=1e-3)


def test_a_loaded_state_goes_on_to_the_bit() -> None:
    network = small_network()
    optimizer = Muon(network.parameters(), lr=0.01)
    train(network, optimizer, 3, seed=1)
    resumed = copy.deepcopy(network)
    loaded = Muon(resumed.parameters(), lr=0.01)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(network, optimizer, 3, seed=2)
    train(resumed, loaded, 3, seed=2)
    assert all(map(torch.equal, network.parameters(), resumed.parameters()))
