"""The main job from end to end on real images: train, account, plan, unlearn, compare."""

from .run import run_demo as run_demo
