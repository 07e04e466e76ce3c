"""What unlearning achieves, under which assumptions: numpy and scipy only."""
