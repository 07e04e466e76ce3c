"""Deletion requests that wait in a folder: the queue, and the process that serves it."""

from .queue import Event as Event
from .queue import Request as Request
from .queue import RequestQueue as RequestQueue
