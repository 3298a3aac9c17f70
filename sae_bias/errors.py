"""Every error a user can meet, and the exit code the command line gives it."""


class SaeBiasError(Exception):
    """Base of every error raised on purpose; `exit_code` is what `sae-bias` returns."""

    exit_code = 1


class RequestError(SaeBiasError):
    """The request is wrong: a name, a file, a word, a shape. The message says what was expected."""

    exit_code = 2


class MissingError(SaeBiasError):
    """Something is missing: gated or uncached weights, network, disk space, an extra."""

    exit_code = 3


class GateError(SaeBiasError):
    """It ran and the answer is no: a gate stops, `verify` differs, `calibrate` misses a mark."""

    exit_code = 4
