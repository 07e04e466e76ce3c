"""The failures a caller may want to catch; a plain wrong argument is a ValueError or TypeError."""


class OpacusPilError(Exception):
    """Base of every error that belongs to this package."""


class CertificateError(OpacusPilError):
    """A certificate's assumption does not hold, or no number of steps reaches the target."""


class OutOfReachError(CertificateError):
    """No number of steps worth running reaches the target.

    Attributes:
        best: Least ε that some number of them reaches; NaN: not known.
        max_steps: How many were worth running.
    """

    def __init__(self, message: str, best: float = float("nan"), max_steps: int = 0) -> None:
        super().__init__(message)
        self.best, self.max_steps = best, max_steps


class UnsupportedError(OpacusPilError):
    """A use of torch or Opacus for which no sound per-instance number is known."""


class LedgerError(OpacusPilError):
    """A saved or shared accounting state does not fit the accountant it meets."""
