"""The reference of the speed benchmark does honest work."""

import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

import models
import train
from data import Batch

sys.path.append(str(ROOT / "benchmarks"))
from reference import reference_step


@pytest.mark.parametrize("joint", [False, True])
def test_the_reference_computes_the_same_losses(joint):
    """Step for step, on a network without batch norm, where train and eval mode agree."""
    torch.manual_seed(0)
    bodies = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    twins = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    for body, twin in zip(bodies, twins, strict=True):
        twin.load_state_dict(body.state_dict())
    learners = [models.Learner(str(i), body, updates=0, lr=0.01, weight_decay=0.05) for i, body in enumerate(bodies)]
    optimizers = [torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.05) for twin in twins]
    aim, settings = train.own_aim(temperature=1.05, threshold=0.4), train.Settings(uda_steps=1)
    for step in range(6):
        batch = Batch(torch.randn(5, 6), torch.randint(3, (5,)), torch.randn(7, 6), torch.randn(7, 6))
        ours = train.mpl_step(*learners, batch, step, aim=aim, settings=settings)
        theirs = reference_step(*twins, *optimizers, batch, weight=0.27, joint=joint, threshold=0.4)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert float(ours[key]) == pytest.approx(float(theirs[key]), abs=1e-5), key
