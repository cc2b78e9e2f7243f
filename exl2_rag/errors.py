"""Every error this package raises on purpose.

Each message says what was expected, what came, and what to do about it. What a user can get wrong raises one of
these; `assert` is only for what the package itself can get wrong.

    Exl2RagError
     +- SettingsError                  an option or a settings file                      (also ValueError)
     +- ModelError                     a model directory
     |   +- ModelNotFoundError         nothing usable at that path
     |   +- UnsupportedModelError      an architecture or config value that is not honoured
     |   +- CheckpointError            a tensor file: missing, truncated, wrong shape, dtype or contents
     |   +- TokenizerError             tokenizer files missing or broken
     |   +- ChatTemplateError          no chat template, or one that does not render
     |   +- LoraError                  a LoRA adapter that is not for the model, or not supported
     +- RequestError                   a prompt or its sampling parameters              (also ValueError)
     |   +- ContextOverflowError       prompt longer than the model's or the cache's limit
     |   +- ConstraintError            a schema, choice or quote that cannot be enforced
     +- EngineError                    the running engine
     |   +- EngineClosedError          a request after close()
     |   +- RequestCancelledError      the request was cancelled before it finished
     |   +- RequestTimeoutError        the request's `timeout_s` ran out                (also TimeoutError)
     |   +- QueueFullError             more requests wait than `max_waiting` allows
     |   +- PinLimitError              a pin would leave too little of the cache for requests
     |   +- BannedStringsError         every way to go on leads to a banned string
     |   +- CacheIntegrityError        the page table contradicts itself (a bug in this package)
     |   +- KVStoreError               the directory of the persistent KV store cannot be used
     +- KernelError                    an op called with tensors it cannot take
     |   +- ShapeError, DTypeError
     |   +- DeviceError                a device is missing, too old, or tensors live on different ones
     |       +- DeviceMemoryError      the device has no memory left
     +- RetrievalError                 documents and the index
     |   +- DocumentError              one file cannot be read: `.reason` is short and countable
     |   +- EmptyCorpusError           no readable document
     |   +- IndexNotFoundError         no index at that path
     |   +- IndexLockedError           another process has the index open
     |   +- EmbedderMismatchError      the index was built with another embedder
     |   +- TextTooLongError           text longer than the embedder takes
     +- DownloadError                  fetching a model from the hub
     +- ConversionError                making an EXL2 model: the job, its source, its budget
     |   +- CalibrationError           text, activations or weights that cannot be calibrated with
     +- AnswerError                    a model's answer that does not parse or verify
"""

from __future__ import annotations


class Exl2RagError(Exception):
    """Base of all errors of this package."""


class SettingsError(Exl2RagError, ValueError):
    """An option or a settings file holds something it should not."""


class ModelError(Exl2RagError):
    """A model directory cannot be used."""


class ModelNotFoundError(ModelError):
    """There is no model at the given path."""


class UnsupportedModelError(ModelError):
    """The architecture, or a config value that changes the computation, is not supported."""


class CheckpointError(ModelError):
    """A checkpoint file is missing, truncated, or its tensors contradict each other or the config."""


class TokenizerError(ModelError):
    """Tokenizer files are missing or broken."""


class ChatTemplateError(ModelError):
    """The chat template is missing, does not compile or refuses the messages."""


class LoraError(ModelError):
    """A LoRA adapter is missing, broken, made for another model, or asks for something that is not supported."""


class RequestError(Exl2RagError, ValueError):
    """A request that can never run as asked."""


class ContextOverflowError(RequestError):
    """The prompt is longer than the model or the cache allows."""

    def __init__(self, message: str, *, prompt_tokens: int, limit_tokens: int) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.limit_tokens = limit_tokens


class ConstraintError(RequestError):
    """A constraint that cannot be enforced as given."""


class EngineError(Exl2RagError):
    """The engine could not go on with a request."""


class EngineClosedError(EngineError):
    """The engine was closed."""


class RequestCancelledError(EngineError):
    """The request was cancelled before it finished."""


class RequestTimeoutError(EngineError, TimeoutError):
    """The request did not finish within its `timeout_s`."""


class QueueFullError(EngineError):
    """The engine has as many requests as it takes; try again later."""


class PinLimitError(EngineError):
    """A pin would leave too little of the cache for requests."""


class BannedStringsError(EngineError):
    """Every way to go on leads to a banned string."""


class CacheIntegrityError(EngineError):
    """The page table contradicts itself."""


class KVStoreError(EngineError):
    """The directory of the persistent KV store cannot be used as asked."""


class KernelError(Exl2RagError):
    """An op was called with tensors it cannot take."""


class ShapeError(KernelError):
    """A tensor has the wrong shape."""


class DTypeError(KernelError):
    """A tensor has the wrong element type."""


class DeviceError(KernelError):
    """A device is missing, unsupported, or tensors live on different ones."""


class DeviceMemoryError(DeviceError):
    """A device has no memory left."""


class RetrievalError(Exl2RagError):
    """Base of errors about documents and the index."""


class DocumentError(RetrievalError):
    """One file cannot be turned into text.

    `reason` is a short, countable word such as "encrypted", "empty", "unsupported" or "broken".
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class EmptyCorpusError(RetrievalError):
    """No readable document was found."""


class IndexNotFoundError(RetrievalError):
    """There is no index at the given path."""


class IndexLockedError(RetrievalError):
    """Another process holds the index."""


class EmbedderMismatchError(RetrievalError):
    """The index was built with another embedder than the one given."""


class TextTooLongError(RetrievalError):
    """A text is longer than the embedder takes; embedding it would silently cut it."""


class AnswerError(Exl2RagError):
    """The model's answer does not parse or does not hold against its sources."""


class DownloadError(Exl2RagError):
    """A model cannot be fetched from the hub."""


class ConversionError(Exl2RagError):
    """An EXL2 model cannot be made: the job directory, the source, the disk or the budget."""


class CalibrationError(ConversionError):
    """Text, activations or weights that cannot be calibrated with."""
