"""Adapters to torch and Opacus: what was in a batch and how large its gradients were."""
