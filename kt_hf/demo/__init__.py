"""`kt-hf demo`: a small mixture-of-experts model, trained and checked on any computer within minutes."""

__all__ = ["DemoError"]


class DemoError(RuntimeError):
    """The demo cannot go on.

    Args:
        message: For the user.
        exit_code: 2 for something the user can set right (a missing package, a bad option), 1 for a run that failed.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
