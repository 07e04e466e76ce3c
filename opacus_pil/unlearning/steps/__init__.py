"""The steps themselves, by their kind: of the training's kernel, averaged, plain."""
