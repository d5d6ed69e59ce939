"""Starts and stops the predictor as a detached process of the local stack."""

from services.web_service import WebService

_SERVICE = WebService("predictor", "services.predictor", "predictor_port")

NAME = _SERVICE.name
start_predictor = _SERVICE.start
stop_predictor = _SERVICE.stop
predictor_address = _SERVICE.address
event_log_path = _SERVICE.event_log_path
is_healthy = _SERVICE.is_healthy
