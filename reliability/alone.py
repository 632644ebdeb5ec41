"""Leadership without an election, for producers that are the only ones of their prefix."""

from __future__ import annotations

from bourse_schemas.election import Election
from bourse_schemas.errors import Fenced

__all__ = ["Alone"]


class Alone(Election):
    """Leads from the first moment on."""

    def __init__(self) -> None:
        """Join nothing."""

    @property
    def leads(self) -> bool:
        """Lead."""
        return True

    def term(self, wait_seconds: float = 0.0) -> int | None:
        """Lead."""
        return 1

    def owe(self, in_seconds: float | None) -> None:
        """Owe nothing to anybody."""

    def overdue(self) -> bool:
        """Owe nothing to anybody."""
        return False

    def resign(self) -> None:
        """End: there is a second instance."""
        raise Fenced("another instance took over")

    def close(self) -> None:
        """Leave nothing."""
