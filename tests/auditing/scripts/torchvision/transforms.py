"""What the MNIST example asks for."""

import torch


class Compose:
    """One after the other."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, image):
        for step in self.steps:
            image = step(image)
        return image


class ToTensor:
    """From (rows, columns) to (1, rows, columns)."""

    def __call__(self, image):
        return torch.from_numpy(image)[None]


class Normalize:
    """Subtract and divide."""

    def __init__(self, mean, std):
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def __call__(self, image):
        return (image - self.mean[:, None, None]) / self.std[:, None, None]
