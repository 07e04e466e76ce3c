"""Loops, models and collate functions that several of the cases share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset, default_collate

from tests.cases.trainings import plain_loop, points


def several_steps(training):
    for inputs, targets in training.loader:
        for _ in range(10):
            training.step(inputs, targets)


def views(items):
    return tuple(torch.cat([leaf, leaf]) for leaf in default_collate(items))


def mixup(training):
    for inputs, targets in training.loader:
        training.step(0.6 * inputs + 0.4 * inputs.roll(1, 0), targets)


def another_backward(training):
    for inputs, targets in training.loader:
        training.backward(inputs, targets)
        weight, bias = training.plain.weight, training.plain.bias
        F.cross_entropy(F.linear(inputs, weight, bias), targets).backward()
        training.optimizer.step()


def scaled(training):
    for inputs, targets in training.loader:
        training.backward(inputs, targets)
        for parameter in training.plain.parameters():
            parameter.grad.mul_(10.0)
        training.optimizer.step()


def scaled_unseen(training):
    """`.data` has a version counter of its own."""
    for inputs, targets in training.loader:
        training.backward(inputs, targets)
        for parameter in training.plain.parameters():
            parameter.grad.data.mul_(10.0)
        training.optimizer.step()


def hooked(training):
    for parameter in training.plain.parameters():
        parameter.register_hook(lambda gradient: 5.0 * gradient)
    plain_loop(training)


def hooked_a_little(training):
    """Less than what unclipped rows leave free: the sum alone does not show it."""
    for parameter in training.plain.parameters():
        parameter.register_hook(lambda gradient: 1.3 * gradient)
    plain_loop(training)


class OneOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, inputs):
        return self.layer(inputs)


def one_output(*, shape=(-1, 1)) -> TensorDataset:
    inputs, targets = points().tensors
    return TensorDataset(inputs, (targets % 2).float().reshape(shape))


class Contrastive(nn.Module):
    """In-batch negatives beside the rows' own loss."""

    reduction = "mean"

    def forward(self, outputs, targets):
        pairs = outputs @ outputs.T / 2
        losses = F.cross_entropy(pairs, torch.arange(len(outputs)), reduction="none")
        losses = losses + F.cross_entropy(outputs, targets, reduction="none")
        return losses if self.reduction == "none" else losses.mean()


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.body.requires_grad_(False)

    def forward(self, inputs):
        return self.head(torch.tanh(self.body(inputs)))
