"""The server forgets old runs and old events by itself, with the settings that the stack starts it with."""

import os
import sqlite3
import time
import uuid
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from services.prefect_server import prefect_home, start_prefect_server, stop_prefect_server


@pytest.mark.slow
def test_the_server_forgets_what_is_older_than_thirty_days(tmp_path, monkeypatch):
    for setting in ("LOOP_SECONDS", "ORPHAN_CLEANUP_LOOP_SECONDS"):
        monkeypatch.setitem(os.environ, f"PREFECT_SERVER_SERVICES_DB_VACUUM_{setting}", "2")
    try:
        with httpx.Client(base_url=start_prefect_server(tmp_path), trust_env=False, timeout=30) as api:
            now = datetime.now(UTC)
            flow_id = api.post("/flows/", json={"name": "training-pipeline"}).json()["id"]
            runs = {}
            for days in (40, 20):
                run = api.post("/flow_runs/", json={"flow_id": flow_id, "name": f"{days} days", "state": {"type": "COMPLETED"}}).json()
                runs[days] = run["id"]
                log = {"name": "ml", "level": 20, "message": f"{days} days", "timestamp": now.isoformat(), "flow_run_id": run["id"]}
                assert api.post("/logs/", json=[log]).status_code == 201
                artifact = {"key": "clean-up", "type": "markdown", "data": f"{days} days", "flow_run_id": run["id"]}
                assert api.post("/artifacts/", json=artifact).status_code == 201
            events = [
                {
                    "id": str(uuid.uuid4()),
                    "occurred": (now - timedelta(days=days)).isoformat(),
                    "event": "retrain.requested",
                    "resource": {"prefect.resource.id": f"millstream.model.aged-{days}"},
                    "payload": {},
                }
                for days in (40, 20)
            ]
            assert api.post("/events", json=events).status_code == 204

            # Runs end when they end, so their age is made in the database.
            with sqlite3.connect(prefect_home(tmp_path) / "prefect.db", timeout=60) as database:
                for days, run_id in runs.items():
                    ended = (now - timedelta(days=days)).strftime("%Y-%m-%d %H:%M:%S.%f")
                    changed = database.execute("UPDATE flow_run SET end_time = ? WHERE id = ?", (ended, run_id))
                    assert changed.rowcount == 1
            database.close()

            def left() -> dict[str, set[str]]:
                since = {"occurred": {"since": (now - timedelta(days=60)).isoformat()}, "event": {"name": ["retrain.requested"]}}
                found = api.post("/events/filter", json={"filter": since}).json()["events"]
                return {
                    "runs": {run["name"] for run in api.post("/flow_runs/filter", json={}).json()},
                    "logs": {log["message"] for log in api.post("/logs/filter", json={}).json()},
                    "artifacts": {artifact["data"] for artifact in api.post("/artifacts/filter", json={}).json()},
                    "events": {event["resource"]["prefect.resource.id"] for event in found},
                }

            young = {"20 days"}
            expected = {"runs": young, "logs": young, "artifacts": young, "events": {"millstream.model.aged-20"}}
            deadline = time.monotonic() + 90
            while (found := left()) != expected:
                assert time.monotonic() < deadline, found
                time.sleep(0.5)
            time.sleep(5)  # two more rounds take nothing else
            assert left() == expected
    finally:
        stop_prefect_server(tmp_path)
