"""The exceptions of kt_hf. Every one is a `KTAMXError`, and also the built-in kind a caller would expect."""


class KTAMXError(Exception):
    """Base class of everything kt_hf raises on purpose."""


class KTAMXNotAvailableError(KTAMXError, ImportError):
    """A backend was asked for that this machine or this installation cannot run."""


class KTAMXModelNotSupportedError(KTAMXError, ValueError):
    """The model has no experts that kt_hf can compute, or experts of a kind it does not know."""


class KTAMXConfigError(KTAMXError, ValueError):
    """A setting is wrong, or two settings do not go together."""


class KTAMXForwardError(KTAMXError, RuntimeError):
    """An expert layer was called with bad input, or computed something that is not finite."""


class KTAMXBackwardError(KTAMXError, RuntimeError):
    """The backward of an expert layer could not be done, or gave something that is not finite."""


class KTAMXDiskFullError(KTAMXError, OSError):
    """A disk or quota has no room for what is to be written, or ran out of it; what was whole before is whole still."""
