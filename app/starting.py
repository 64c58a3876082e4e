"""Why a process cannot start, in one sentence for its operator."""

from pymongo.errors import PyMongoError
from redis.exceptions import RedisError

from app.config import PlaceRefused
from app.errors import ModelUnavailable, Problem

#: Exit status when the operator must first correct something (EX_CONFIG in sysexits.h).
UNUSABLE_CONFIGURATION = 78


class NotStarted(Exception):
    """The process cannot start. The message says why, in one sentence."""


def as_sentence(error: BaseException) -> str | None:
    """The reason, if the operator can correct it. None for a fault of the program, which needs its traceback."""
    text = f"{type(error).__name__}: {error!s:.200}"
    match error:
        case ModelUnavailable():
            sentence = f"The face model cannot be used: {error.detail}"
        case PlaceRefused():
            sentence = str(error)
        case Problem():
            sentence = f"{error.title}: {error.detail}"
        case PyMongoError():
            sentence = f"MONGODB_URI: MongoDB cannot be used: {text}"
        case RedisError():
            sentence = f"REDIS_URL: Redis cannot be used: {text}"
        case ValueError() | OSError():  # something that the settings name is missing or wrong
            sentence = f"{error!s:.500}"
        case _:
            return None
    return " ".join(sentence.split())
