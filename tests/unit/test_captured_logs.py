"""Lines are captured whatever an earlier test has configured."""

import logging

import structlog

from app.use_cases import sweep_photos
from tests.support.logs import captured_logs


def test_a_former_level_and_a_kept_configuration_hide_no_line() -> None:
    before = structlog.get_config()
    try:
        structlog.configure(
            processors=[structlog.processors.KeyValueRenderer()],
            wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
            cache_logger_on_first_use=True,
        )
        sweep_photos.log.error("first")
        structlog.configure(processors=[structlog.processors.JSONRenderer()])
        with captured_logs() as lines:
            sweep_photos.log.info("second")
        assert [line["event"] for line in lines] == ["second"]
    finally:
        sweep_photos.log.__dict__.pop("bind", None)
        structlog.configure(**before)
