"""From what a noisy step did to what may be claimed for it."""
