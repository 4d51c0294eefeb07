"""What every worker needs, imported once: in the process of which the workers are forks."""

import sinktrack.archive.beside
import sinktrack.archive.huggingface
import sinktrack.measure
import sinktrack.models.blockwise
import sinktrack.models.streaming
import sinktrack.scan  # noqa: F401
