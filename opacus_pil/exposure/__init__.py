"""Who is exposed: per-instance ε as a result that answers, in tables, figures and by id."""

from .per_instance_epsilon import PerInstanceEpsilon as PerInstanceEpsilon

__all__ = ["PerInstanceEpsilon"]
