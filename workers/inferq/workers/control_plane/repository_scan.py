"""Reads the repository at a worker's start: the models to serve, and what cannot be served."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inferq.shared.errors import ConfigError
from inferq.shared.names import is_model_name
from inferq.workers.logs.fields import about
from inferq.workers.logs.printing import plain
from inferq.workers.models.folders import look_through, why_no_name
from inferq.workers.models.not_served import NotServed, not_served
from inferq.workers.models.repository import load_models
from inferq.workers.models.spec import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepositoryScan:
    """What was found of the models that a worker was told to serve."""

    specs: Sequence[ModelSpec]
    #: Those that cannot be served.
    bad: Sequence[NotServed]
    #: All models in the repository with names that no queue can have.
    misnamed: Sequence[NotServed]
    #: Folders of the repository that hold no model.
    others: Sequence[str]

    @property
    def passed_over(self) -> list[NotServed]:
        """Versions that cannot be served, for which older ones are served."""
        return [each for spec in self.specs for each in spec.passed_over]

    @property
    def not_served(self) -> list[NotServed]:
        return [*self.bad, *self.misnamed, *self.passed_over]

    def check(self, *, strict: bool) -> None:
        """ConfigError if no model can be served; `strict`: if not all newest versions can be."""
        missing = [*self.bad, *(self.passed_over if strict else ())]
        if missing and (strict or not self.specs):
            raise ConfigError("\n".join(each.reason for each in missing))

    def log(self) -> None:
        """Log what is not served."""
        for each in (*self.bad, *self.misnamed):
            log_not_served(each)
        for spec in self.specs:
            for each in spec.passed_over:
                logger.error(
                    "model %r version %d is passed over, and version %d is served: %s",
                    each.model,
                    each.version,
                    spec.version,
                    each.reason,
                    extra=about(model=each.model),
                )
        if self.others:
            logger.info("passed over, as they hold no model: %s", ", ".join(self.others))


def log_not_served(each: NotServed) -> None:
    """Log it at CRITICAL."""
    logger.critical(
        "model %r is not served: %s", each.model, each.reason, extra=about(model=each.model)
    )


def scan_repository(root: Path, names: Sequence[str], *, on_cpu: bool) -> RepositoryScan:
    """Read the models `names` of the repository `root`. ConfigError if that is no folder."""
    folders = look_through(root)
    specs, bad = load_models(root, names, on_cpu=on_cpu)
    misnamed = [name for name in folders.models if not is_model_name(name)]
    return RepositoryScan(
        specs=specs,
        bad=bad,
        misnamed=[not_served(name, why_no_name(name)) for name in misnamed],
        others=[plain(name) for name in folders.others],
    )
