"""The original project's way of taking a step, written plainly: what the speed benchmark compares with.

Two whole networks in train mode and float32, the frozen backbones inside the graph, five forward passes a step: the
teacher on the labelled and strong views and on the weak ones, the student on the strong views and on the labelled
images before and after its update. With ``joint``, three, as ports of the paper's code do: the teacher on all views at
once, the student on the strong views and labelled images together, and after its update. The losses are
``train.mpl_step``'s.
"""

import torch
import torch.nn.functional as F
from torch import nn

import train
from data import Batch


def reference_step(
    teacher: nn.Module,
    student: nn.Module,
    t_optimizer: torch.optim.Optimizer,
    s_optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    weight: float,
    joint: bool = False,
    temperature: float = 1.05,
    threshold: float = 0.75,
) -> dict[str, torch.Tensor]:
    """One step; ``weight`` is that of the consistency loss. Returns the measurements of ``mpl_step``."""
    x_l, y_l, x_uw, x_us, _ = batch
    if joint:
        logits_l, logits_uw, logits_us = teacher(torch.cat([x_l, x_uw, x_us])).split([len(x_l), len(x_uw), len(x_us)])
        p, mask = train.soft_target(logits_uw, temperature, threshold)
    else:
        p, mask = train.soft_target(teacher(x_uw), temperature, threshold)
        logits_l, logits_us = teacher(torch.cat([x_l, x_us])).split([len(x_l), len(x_us)])
    loss_l = F.cross_entropy(logits_l, y_l)
    loss_u = train.consistency_loss("CE", logits_us, p, mask)
    pseudo = logits_us.argmax(-1)

    if joint:
        s_logits_us, s_logits_l = student(torch.cat([x_us, x_l])).split([len(x_us), len(x_l)])
    else:
        s_logits_us, s_logits_l = student(x_us), student(x_l)
    loss_s = F.cross_entropy(s_logits_us, pseudo)
    loss_old = F.cross_entropy(s_logits_l, y_l).detach()
    s_optimizer.zero_grad()
    loss_s.backward()
    s_optimizer.step()
    loss_new = F.cross_entropy(student(x_l), y_l).detach()
    h = loss_old - loss_new

    loss_mpl = h * F.cross_entropy(logits_us, pseudo)
    t_optimizer.zero_grad()
    (loss_l + weight * loss_u + loss_mpl).backward()
    t_optimizer.step()
    measured = {"loss_l": loss_l, "loss_u": loss_u, "mask_rate": mask.mean(), "loss_s": loss_s, "loss_mpl": loss_mpl}
    return {key: value.detach() for key, value in measured.items()} | {"h": h}
