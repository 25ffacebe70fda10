"""Models kept in an S3 bucket, through DVC's own commands against a real S3 server."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx
import pytest
from moto import server

ROOT = Path(__file__).parents[1]
STAGES = """
stages:
  quantize:
    cmd: python make.py
    deps: [make.py]
    outs: [models/int8]
    metrics: [{reports/quantize.json: {cache: false}}]
"""
MAKE = """
from pathlib import Path
for name, content in (("models/int8/model.onnx", "weights" * 1000), ("reports/quantize.json", '{"model_bytes": 7000}')):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(content)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    url = f"http://{host}:{port}/bucket"
    httpx.put(url).raise_for_status()
    yield url
    running.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, bucket: str) -> Path:
    """A repository whose model was pushed, by the commands of docs/USAGE.md."""
    folder = tmp_path_factory.mktemp("project")
    for name, text in (("dvc.yaml", STAGES), ("make.py", MAKE), (".gitignore", "/models\n")):
        (folder / name).write_text(text)
    run(folder, "git", "init", "-q")
    run(folder, "dvc", "init", "-q")
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    run(folder, "dvc", "remote", "add", "-d", "storage", "s3://bucket/models")
    run(folder, "dvc", "remote", "modify", "storage", "endpointurl", bucket.removesuffix("/bucket"))
    run(folder, "dvc", "remote", "modify", "storage", "verify", "true")
    run(folder, "dvc", "repro", "-q")
    run(folder, "dvc", "push", "-q")
    run(folder, "git", "add", ".")
    run(folder, "git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "model")
    return folder


def run(folder: Path, *command: str, fails: bool = False) -> str:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    environment = os.environ | keys | {"PATH": programs, "AWS_MAX_ATTEMPTS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert bool(done.returncode) is fails, said
    return said


@pytest.fixture
def clone(project: Path, tmp_path: Path) -> Path:
    run(tmp_path, "git", "clone", "-q", str(project), "clone")
    return tmp_path / "clone"


def key_of(file: Path) -> str:
    """Under which DVC keeps it in the bucket."""
    md5 = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    return f"models/files/md5/{md5[:2]}/{md5[2:]}"


@pytest.mark.slow
def test_fresh_clone_has_the_models_that_were_pushed(clone: Path) -> None:
    run(clone, "dvc", "pull", "-q")
    assert (clone / "models/int8/model.onnx").read_text() == "weights" * 1000
    assert "up to date" in run(clone, "dvc", "repro")


@pytest.mark.slow
def test_pull_refuses_a_wrong_byte_and_a_missing_object(project: Path, clone: Path, bucket: str) -> None:
    server_url = bucket.removesuffix("/bucket")
    s3 = boto3.client("s3", endpoint_url=server_url, aws_access_key_id="key", aws_secret_access_key="secret")  # noqa: S106
    file = project / "models/int8/model.onnx"
    place, content = {"Bucket": "bucket", "Key": key_of(file)}, file.read_bytes()
    try:
        s3.put_object(**place, Body=b"W" + content[1:])
        assert "models/int8" in run(clone, "dvc", "pull", fails=True)
        assert not (clone / "models/int8/model.onnx").exists()
        s3.delete_object(**place)
        said = run(clone, "dvc", "pull", fails=True)
        # DVC names it by its path or, once it knows the folder, by its hash.
        assert "models/int8" in said or Path(place["Key"]).parent.name + Path(place["Key"]).name in said
    finally:
        s3.put_object(**place, Body=content)


@pytest.mark.slow
def test_error_names_a_remote_that_refuses_the_keys_or_is_out_of_reach(clone: Path, bucket: str) -> None:
    access = f"{bucket.removesuffix('/bucket')}/moto-api/reset-auth"
    httpx.post(access, content=b"0").raise_for_status()
    try:
        assert "bucket/models" in run(clone, "dvc", "pull", fails=True)
    finally:
        httpx.post(access, content=b"inf").raise_for_status()
    run(clone, "dvc", "remote", "modify", "storage", "endpointurl", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in run(clone, "dvc", "pull", fails=True)
