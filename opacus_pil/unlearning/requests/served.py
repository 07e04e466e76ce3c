"""Served: what one call of `serve` has finished, and the certificates that it wrote."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn

from ...certificates.certificate_file import read_certificate, read_key
from ...certificates.verification import verify_certificate
from ...certificates.verification_report import VerificationReport
from ...errors import CertificateError
from ...files.model_hash import model_hash
from .model_file import NAME
from .queue import Request
from .served_run import ServedRun


class Served(list[Request]):
    """Requests that were done or failed, in that order; a list.

    Args:
        requests: They.
        folder: Where the queue keeps its certificates.
        runs: What ran in this process, by the number of the batch.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        *,
        folder: Path,
        runs: Mapping[int, ServedRun] | None = None,
    ) -> None:
        super().__init__(requests)
        self.folder, self._runs = folder, dict(runs or {})

    @property
    def model(self) -> Path:
        """The file of the weights after the last request, once one is done; see `model_file`."""
        return self.folder / NAME

    @property
    def certificates(self) -> tuple[Path, ...]:
        """The certificate files that were written, each once, in the order of their runs."""
        names = [(one.result or {}).get("certificate_file") for one in self]
        return tuple(self.folder / name for name in dict.fromkeys(names) if name)

    def verify(
        self,
        *,
        model: nn.Module | None = None,
        ids: Sequence[str | int] | None = None,
        signed_by: str | None = None,
    ) -> VerificationReport:
        """Read the certificate of some ids from disk and recompute what it says.

        Guarantee: that of `certificates.verify_certificate`, which is run on the file and its key.

        Args:
            model: Held against the model after unlearning; plain or wrapped.
            ids: Who is looked for among the forgotten. Default: nobody is, and there must be one
                certificate.
            signed_by: Public key that must have signed it, 32 bytes in hex.

        Raises:
            CertificateError: No certificate was written for them (the message says why), or several
                were.
            LedgerError, OSError: The file is damaged or gone.
        """
        wanted = None if ids is None else set(ids)
        chosen = [one for one in self if wanted is None or wanted & set(one.ids)]
        names = [(one.result or {}).get("certificate_file") for one in chosen]
        files = list(dict.fromkeys(name for name in names if name))
        if len(files) != 1:
            raise CertificateError(
                f"Expected one certificate for these requests, got {len(files)}: "
                f"{'; '.join(map(_words, chosen)) or 'nobody asked for these ids here'}. "
                "Name the ids of one run."
            )
        path = self.folder / files[0]
        key = Path(f"{path}.key")
        return verify_certificate(
            read_certificate(path),
            model_sha256=None if model is None else model_hash(model),
            key=read_key(key) if key.exists() else None,
            ids=ids,
            signed_by=signed_by,
        )

    def write_report(
        self,
        path: str | os.PathLike[str],
        *,
        gap: Mapping[str, Any] | None = None,
        public: bool = False,
    ) -> None:
        """Write the evidence of these requests as a page, as `UnlearningResult.write_report` does.

        Run by run: plan, what ran, the certificate with its assumptions or "no claim". Who failed
        stands there with the reason. What is missing of a run of another process is said; claimed
        about it is what its certificate file proves.

        Args:
            path: Target file; the old one stays whole until the new one is complete.
            gap: `evaluation.oracle_gap` of the model after the last run; None: not measured.
            public: What may be shown only: each run's method, target, claim and assumptions; not
                who was forgotten, nor what depends on them.

        Raises:
            ImportError: An extra is missing; install `report`.
            TypeError: `gap` holds something else; nothing is written.
            UnsupportedError: `public`, and no run of this process: of others only private files are
                left.
            OSError: The folder is missing or not writable.

        Privacy: unless `public` the page shows ids, numbers of steps and measurements, which depend
            on the forgotten data.
        """
        from .served_page import write_served  # the optional extra

        write_served(self, path, runs=self._runs, folder=self.folder, gap=gap, public=public)


def _words(request: Request) -> str:
    found = request.result or {}
    why = found.get("certificate_file") or found.get("no_certificate_file") or found.get("reason")
    return f"{request.request_id}: {request.state}, {why or found.get('status', 'no result')}"
