"""Every error a user can meet, and the exit code the command line gives it."""

MOST_CHARACTERS = 2000


class SaeBiasError(Exception):
    """Base of every error raised on purpose; `exit_code` is what `sae-bias` returns.

    Its text is one line, whatever a file or a name it quotes holds: control characters are written out, and it is cut where no one
    would read on.
    """

    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()
        if not text.isprintable():
            text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
        return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


class RequestError(SaeBiasError):
    """The request is wrong: a name, a file, a word, a shape. The message says what was expected."""

    exit_code = 2


class MissingError(SaeBiasError):
    """Something is missing: gated or uncached weights, network, disk space, an extra."""

    exit_code = 3


class GateError(SaeBiasError):
    """It ran and the answer is no: a gate stops, `verify` differs, `calibrate` misses a mark."""

    exit_code = 4
